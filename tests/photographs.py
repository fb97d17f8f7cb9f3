"""Twelve pictures of many sizes, made of scikit-learn's two photographs."""

import PIL.Image
import sklearn.datasets

CHINA, FLOWER = range(2)
# Which photograph, a box of it (left, top, right, bottom), by how many degrees
# it is turned, and its size in the end.
PICTURES = (
  (CHINA, (0, 0, 640, 427), 0, (640, 427)),
  (FLOWER, (0, 0, 640, 427), 0, (640, 427)),
  (CHINA, (101, 20, 400, 423), 0, (299, 403)),
  (FLOWER, (150, 60, 451, 361), 90, (301, 301)),
  (CHINA, (0, 0, 640, 427), 180, (333, 223)),
  (FLOWER, (0, 0, 640, 427), 270, (211, 317)),
  (CHINA, (200, 0, 640, 400), 0, (1101, 1001)),
  (FLOWER, (40, 100, 600, 300), 0, (997, 356)),
  (CHINA, (0, 150, 427, 427), 90, (180, 277)),
  (FLOWER, (200, 50, 424, 274), 0, (224, 224)),
  (CHINA, (50, 50, 306, 306), 15, (256, 256)),
  (FLOWER, (250, 0, 350, 427), 0, (101, 430)),
)


def write(folder):
  """Writes them into a folder, and returns their paths in order."""
  photographs = sklearn.datasets.load_sample_images().images
  paths = []
  for number, (which, box, degrees, size) in enumerate(PICTURES):
    picture = PIL.Image.fromarray(photographs[which]).crop(box)
    picture = picture.rotate(degrees, expand=degrees % 90 == 0).resize(size)
    # The half of them in a format that browsers and Pillow decode alike.
    suffix = 'png' if number % 2 else 'jpg'
    paths.append(folder / f'{number:02}.{suffix}')
    picture.save(paths[-1])
  return paths
