"""Draws printed characters from the fonts of a machine: real images, offline.

  apt-get install fonts-dejavu fonts-lato ...     # as many packages as you like
  python -m experiments.glyphs.prepare --source /usr/share/fonts OUTPUT

OUTPUT/glyphs.npz is what dataset.py reads; OUTPUT/fonts.json names the fonts,
their licences as they state them, what was left out and why, and a digest.
A family of fonts is in one split alone. Nothing of a font is copied but the
pictures, which stay on the machine.
"""

import argparse
import hashlib
import json
import pathlib

from matplotlib import ft2font
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from experiments.glyphs import dataset
from ijckd_jax.runtime import config_utils

SIDE = 32
# The height that the tallest and the deepest character of a font share.
HEIGHT = 26
REFERENCE = 100  # Pixels of the em by which a font is measured first.
TEST_SHARE = 0.25
# Of a font's `name` table: licence, its address, copyright.
NAMES = {'licence': 13, 'address': 14, 'copyright': 0}
WINDOWS = (3, 1, 0x409)


def find(source: pathlib.Path) -> list[pathlib.Path]:
  """Returns the font files below a folder, in order."""
  kinds = ('.ttf', '.otf')
  return sorted(p for p in source.rglob('*') if p.suffix.lower() in kinds)


def describe(path: pathlib.Path) -> dict:
  """Returns family, style and licence of a font, and what it lacks."""
  font = ft2font.FT2Font(str(path))
  table = font.get_sfnt()
  said = {}
  for name, number in NAMES.items():
    raw = table.get((*WINDOWS, number))
    said[name] = raw.decode('utf-16-be', 'replace') if raw else ''
  return {
    'file': path.name,
    'family': font.family_name,
    'style': font.style_name,
    'missing': [c for c in dataset.DRAWN if ord(c) not in font.get_charmap()],
    **said,
  }


def draw(path: pathlib.Path) -> np.ndarray:
  """Returns the characters of a font, (len(DRAWN), SIDE, SIDE) uint8.

  They keep their sizes to each other: one scale and one baseline for all.
  """
  measured = ImageFont.truetype(str(path), REFERENCE)
  boxes = [measured.getbbox(c, anchor='ls') for c in dataset.DRAWN]
  top, bottom = min(b[1] for b in boxes), max(b[3] for b in boxes)
  widest = max(b[2] - b[0] for b in boxes)
  scale = min(HEIGHT / (bottom - top), (SIDE - 2) / widest)
  font = ImageFont.truetype(str(path), REFERENCE * scale)
  baseline = (SIDE - (bottom - top) * scale) / 2 - top * scale
  images = []
  for character in dataset.DRAWN:
    left, _, right, _ = font.getbbox(character, anchor='ls')
    image = Image.new('L', (SIDE, SIDE))
    ImageDraw.Draw(image).text(
      ((SIDE - right - left) / 2, baseline),
      character,
      fill=255,
      font=font,
      anchor='ls',
    )
    images.append(np.asarray(image))
  return np.stack(images)


def problem(images: np.ndarray) -> str:
  """Returns why a font's pictures are of no use; '' if they are.

  Fonts of icons, of capitals alone, or with one picture for all that they lack,
  draw two characters of different classes alike.
  """
  seen = {}
  for image, character in zip(images, dataset.DRAWN, strict=True):
    if image.max() < 128:
      return f'{character!r} is blank'
    other = seen.setdefault(image.tobytes(), character)
    if dataset.class_of(other) != dataset.class_of(character):
      return f'{other!r} and {character!r} are alike'
  return ''


def is_test(family: str) -> bool:
  """Returns whether a family of fonts is for the test: by its name alone."""
  digest = hashlib.sha256(family.lower().encode()).digest()
  return int.from_bytes(digest[:4], 'big') / 2**32 < TEST_SHARE


def collect(paths) -> tuple[list, list]:
  """Returns the fonts that are used, with their pictures, and the others."""
  used, left_out = [], []
  for path in paths:
    try:
      font = describe(path)
      reason = f'no {"".join(font["missing"])}' if font['missing'] else ''
      images = None if reason else draw(path)
      reason = reason or problem(images)
    except (OSError, RuntimeError, ValueError, ZeroDivisionError) as error:
      font = {'file': path.name}
      reason = config_utils.short(error)
    if reason:
      left_out.append({'file': path.name, 'reason': reason})
      continue
    del font['missing']
    used.append((font, images))
  return used, left_out


def arrays_of(used) -> dict[str, np.ndarray]:
  """Returns images and labels of both splits, without a picture twice.

  Of equal pictures of a class the first one stays; one that is in a font for
  training is not tested on.
  """
  labels = np.array([dataset.class_of(c) for c in dataset.DRAWN], np.int32)
  found, seen = {}, set()
  for split in ('train', 'test'):
    kept = []
    for font, images in used:
      if is_test(font['family']) != (split == 'test'):
        continue
      for image, label in zip(images, labels, strict=True):
        key = (int(label), image.tobytes())
        if key not in seen:
          seen.add(key)
          kept.append((image, label))
    if not kept:
      raise config_utils.UserError(
        f'no font is left for the split {split}: install more font packages'
      )
    found[f'{split}_images'] = np.stack([image for image, _ in kept])[..., None]
    found[f'{split}_labels'] = np.array([y for _, y in kept], np.int32)
  return found


def main(argv: list[str]) -> None:
  """Writes the data set."""
  parser = config_utils.ArgumentParser(
    prog='python -m experiments.glyphs.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('output', type=pathlib.Path)
  parser.add_argument('--source', type=pathlib.Path, required=True)
  flags = parser.parse_args(argv)
  used, left_out = collect(find(flags.source))
  arrays = arrays_of(used)
  digest = hashlib.sha256()
  for name, array in arrays.items():
    digest.update(name.encode() + array.tobytes())
  flags.output.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(flags.output / dataset.FILE, **arrays)
  families = {font['family'] for font, _ in used}
  num_test = sum(map(is_test, families))
  fonts = {
    'sha256': digest.hexdigest(),
    'images': {s: len(arrays[f'{s}_labels']) for s in ('train', 'test')},
    'families': {'train': len(families) - num_test, 'test': num_test},
    'used': [font for font, _ in used],
    'left_out': left_out,
  }
  (flags.output / 'fonts.json').write_text(json.dumps(fonts, indent=1) + '\n')
  print(
    f'{len(used)} fonts, {fonts["families"]["train"]} families to train on and '
    f'{fonts["families"]["test"]} to test on: {fonts["images"]}; '
    f'{len(left_out)} fonts left out; sha256 {fonts["sha256"][:16]}'
  )


if __name__ == '__main__':
  config_utils.run_command(main)
