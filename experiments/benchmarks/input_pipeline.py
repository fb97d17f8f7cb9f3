"""Images per second that are read, decoded, cropped and resized, by whom.

  python -m experiments.benchmarks.input_pipeline [--json FILE]

JPEGs of ImageNet's sizes are made of scikit-learn's two photographs. Every
candidate is a process, pinned to as many cores as the table says; windows take
turns. See README.md.
"""

import argparse
import io
import json
import os
import pathlib
import statistics
import sys
import tempfile

import numpy as np
import PIL.Image
import sklearn.datasets
import tensorflow_datasets as tfds

from experiments.benchmarks import worker
from ijckd_jax.data.datasets import prepared
from ijckd_jax.runtime import markdown

READER = 'experiments.benchmarks.input_reader'
# More batches than any candidate has ready, which it made before its turn.
READY = 8
# What is measured: library, workers, cores.
CANDIDATES = {
  'ours, in the process': ('ours', 0, 1),
  'ours, 1 worker': ('ours', 1, 1),
  'ours, 2 workers': ('ours', 2, 2),
  "ours, PIL's resize": ('ours_pil', 0, 1),
  'ours, simplejpeg': ('simplejpeg', 0, 1),
  'PyTorch, in the process': ('torch', 0, 1),
  'PyTorch, 1 worker': ('torch', 1, 1),
  'PyTorch, 2 workers': ('torch', 2, 2),
  'tf.data': ('tensorflow', 0, 1),
  'tf.data, 2 cores': ('tensorflow', 0, 2),
}


def make_jpegs(num: int):
  """Yields encoded images; a side is 500 pixels, the other 333 to 500.

  So are most of ImageNet's, of which the mean is 400 by 350 and 110 kB.
  """
  pictures = sklearn.datasets.load_sample_images().images
  random = np.random.RandomState(0)
  for number in range(num):
    picture = pictures[number % 2]
    height, width = random.randint(200, 427), random.randint(300, 640)
    top = random.randint(427 - height + 1)
    left = random.randint(640 - width + 1)
    size = [500, random.randint(333, 501)]
    random.shuffle(size)
    image = PIL.Image.fromarray(
      picture[top : top + height, left : left + width]
    ).resize(size, PIL.Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=94)
    yield file.getvalue()


def write(folder: pathlib.Path, num: int) -> None:
  """Writes them as files for the others, and as a tfds data set for ours."""
  encoded = list(make_jpegs(num))
  for number, content in enumerate(encoded):
    path = folder / 'files' / f'{number % 10}' / f'{number:05d}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  columns = {
    'image': encoded,
    'label': [number % 10 for number in range(num)],
    'file_name': [f'{number:05d}.jpg' for number in range(num)],
  }
  builder_cls = tfds.builder_cls('imagenet2012')
  prepared.write(builder_cls, str(folder), {'train': columns})


def main():
  """Prints a table and writes the numbers."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--images', type=int, default=3000)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--seconds', type=float, default=3.0, help='of a window')
  parser.add_argument(
    '--tensorflow',
    default=sys.executable,
    help='a Python with tensorflow-cpu, which may not go with the others',
  )
  parser.add_argument(
    '--only', nargs='*', default=list(CANDIDATES), choices=CANDIDATES
  )
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write(folder, args.images)
    workers = {}
    for title in args.only:
      library, num_workers, num_cores = CANDIDATES[title]
      python = args.tensorflow if library == 'tensorflow' else sys.executable
      workers[title] = worker.Worker(
        READER,
        library,
        str(num_workers),
        str(folder),
        env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'},
        python=python,
        cores=num_cores,
      )
      workers[title].wait_until_ready()
      workers[title].pause()
    num_batches = {}
    speeds = {title: [] for title in workers}
    for number in range(1 + args.rounds):
      for title, one in workers.items():
        one.go()
        one.seconds(READY)
        num = num_batches.get(title, READY)
        seconds = one.seconds(num)
        one.pause()
        if number:
          speeds[title].append(64 * num / seconds)
        else:
          num_batches[title] = max(1, round(args.seconds * num / seconds))
    memory = {title: one.peak_memory() for title, one in workers.items()}
    for one in workers.values():
      one.go()
      one.close()
  medians = {title: statistics.median(v) for title, v in speeds.items()}
  theirs = medians.get('PyTorch, in the process', float('nan'))
  rows = [['reader', 'cores', 'images/s', 'per core', "by PyTorch's", 'MB']]
  for title, speed in medians.items():
    _, _, num_cores = CANDIDATES[title]
    rows.append(
      [
        title,
        str(num_cores),
        f'{speed:.0f}',
        f'{speed / num_cores:.0f}',
        f'{speed / num_cores / theirs:.2f}',
        ' + '.join(f'{size:.0f}' for size in memory[title]),
      ]
    )
  print(markdown.grid(rows))
  if args.json:
    content = {'images_per_second': speeds, 'memory_mb': memory}
    args.json.write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
  main()
