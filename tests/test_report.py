"""The report says what was measured, and shows what it says."""

import html.parser
import io
import re

from etils import epath
import matplotlib
import numpy as np
from PIL import Image
import pytest

from ijckd_jax.data import datasets
from ijckd_jax.evaluation import evaluator
from ijckd_jax.reports import plots as plots_lib
from ijckd_jax.reports import report
from ijckd_jax.reports import tables
from ijckd_jax.training import experiment
from tests import test_web

pytestmark = pytest.mark.usefixtures('drawn_plots')

WORST = (128, 0, 38)  # The last colour of matplotlib's YlOrRd.
GREEN, MAGENTA = (0, 255, 0), (255, 0, 255)


def make_summary(method='ijckd', teacher=True, **changes):
  """Returns a summary whose numbers are easy to recognise."""
  config = experiment.default_config(
    dataset='digits', teacher='resnet20', student='resnet8', method=method
  )
  last = {'top1': 0.7, 'top5': 0.95125, 'nll': 1.23456, 'ece': 0.0625}
  pair = {'agreement': 0.6, 'kl': 0.54321} if teacher else {}
  judge = {'top1': 0.9, 'top5': 0.99, 'nll': 0.5, 'ece': 0.015}
  counts = {'backbone': 7000, 'connector': 400, 'head': 100}
  return {
    'student': {'last': last | pair, 'best': last | pair | {'top1': 0.8}},
    'best_step': 1000,
    'best_by': 'test',
    'teacher': judge if teacher else None,
    'teacher_name': 'resnet20' if teacher else None,
    'teacher_origin': {'file': 'a.pth', 'sha256': '12ab'} if teacher else None,
    'parameters': {
      'student': counts,
      'teacher': {'backbone': 19900, 'connector': 0, 'head': 100}
      if teacher
      else None,
    },
    'images_per_second': 3354.4,
    'steps': 2000,
    'test_examples': 10,
    'seed': 7,
    'config': config.to_dict(),
    'versions': {'python': '3.11', 'jax': '0.10'},
    'devices': ['cpu', 'cpu'],
  } | changes


def make_history(terms=('cross_entropy', 'feature', 'logit'), split='test'):
  """Returns rows of two epochs, in which the loss falls a hundredfold."""
  rows = []
  for epoch, loss in ((1, 10.0), (2, 0.1)):
    row = {'step': 1000 * epoch, 'epoch': float(epoch)}
    train = {name: loss / (i + 1) for i, name in enumerate(terms)}
    train |= {'loss': sum(train.values()), 'accuracy': 0.4 * epoch}
    train |= {'learning_rate': 0.1, 'gradient_norm': 1.0}
    rows.append(row | {f'train/{key}': value for key, value in train.items()})
    rows.append(row | {f'{split}/top1': 0.9 - 0.1 * epoch})
  return rows


def make_evaluation(labels, predictions, num_classes, teacher=None):
  confusion = np.zeros((num_classes, num_classes), np.int64)
  np.add.at(confusion, (labels, predictions), 1)
  top1 = float(np.mean(labels == predictions))
  return evaluator.Evaluation(
    {'top1': top1}, confusion, predictions, labels, teacher
  )


def make_case(num_classes=2, shape=(8, 8, 3), **changes):
  """Returns arguments of `write` for ten test images, all of them green.

  The student is wrong on images 0, 1 and 2, which are of class 0 and taken for
  class 1; the teacher on image 3 alone.
  """
  labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1], np.int32)
  judge, predictions = labels.copy(), labels.copy()
  predictions[:3], judge[3] = 1, 1
  images = np.zeros((10, *shape), np.uint8)
  images[...] = GREEN[: shape[-1]] if shape[-1] == 3 else 99
  teacher = make_evaluation(labels, judge, num_classes)
  return {
    'summary': make_summary(),
    'history': make_history(),
    'evaluation': make_evaluation(labels, predictions, num_classes, teacher),
    'arrays': datasets.Arrays(images, labels),
    'class_names': [f'class {i}' for i in range(num_classes)],
  } | changes


def write(folder, **case):
  """Writes a report, checks what is true of every report, and returns it."""
  folder = epath.Path(folder)
  report.write(folder, **case)
  text = (folder / 'report.md').read_text()
  links = re.findall(r'(?<!\\)\[[^\]]*\]\(([^)]*)\)', text)
  assert links
  for link in links:
    assert (folder / link).exists()
  drawn = {f'plots/{path.name}' for path in (folder / 'plots').iterdir()}
  assert drawn == {link for link in links if link.startswith('plots/')}
  for plot in drawn:
    pixels = read_pixels(folder / plot)
    # Five inches at 150 dpi: on a phone, text keeps its size.
    assert pixels.shape[0] > 100 and 100 < pixels.shape[1] < 800
    assert pixels.std() > 5  # Blank pages have none.
  assert {path.name for path in folder.iterdir()} <= {
    'plots',
    'report.html',
    'report.md',
    'teacher',
  }
  return text


def read_pixels(path):
  return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert('RGB'))


def has_color(pixels, color):
  if isinstance(color, str):
    color = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return bool(np.any(np.all(pixels == color, axis=-1)))


def read_table(text):
  """Returns the first table's titles and its rows by name."""
  lines = [line for line in text.splitlines() if line.startswith('|')]
  cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
  return cells[0][1:], {name: values for name, *values in cells[2:]}


def test_table():
  text = report.table(make_summary())
  titles, rows = read_table(text)
  assert titles == [
    'top-1 %',
    'top-5 %',
    'NLL',
    'ECE %',
    'agreement %',
    'KL to teacher',
  ]
  assert rows == {
    'teacher': ['90.00', '99.00', '0.5000', '1.50', '', ''],
    'student, last': ['70.00', '95.12', '1.2346', '6.25', '60.00', '0.5432'],
    'student, best by the test set (step 1,000)': [
      '80.00',
      '95.12',
      '1.2346',
      '6.25',
      '60.00',
      '0.5432',
    ],
  }
  widths = {len(line) for line in text.splitlines() if line.startswith('|')}
  assert len(widths) == 1
  assert text.split('\n\n')[1].splitlines() == [
    '- student resnet8: 7,500 parameters (backbone 7,000, connector 400, head '
    '100)',
    '- teacher resnet20: 20,000 parameters (backbone 19,900, connector 0, head '
    '100)',
    "- the student's share of the teacher's parameters: 37.5%",
    '- training: 3,354 images per second',
  ]


def test_table_without_a_teacher():
  text = report.table(make_summary('ce', teacher=False))
  titles, rows = read_table(text)
  assert titles == ['top-1 %', 'top-5 %', 'NLL', 'ECE %']
  assert list(rows) == [
    'network, last',
    'network, best by the test set (step 1,000)',
  ]
  assert 'teacher' not in text and 'student' not in text
  assert '- network resnet8: 7,500 parameters' in text


def test_table_leaves_out_what_was_not_measured():
  summary = make_summary(images_per_second=None, best_by='validation')
  for metrics in (*summary['student'].values(), summary['teacher']):
    del metrics['top5']
  text = report.table(summary)
  titles, rows = read_table(text)
  assert 'top-5 %' not in titles and len(titles) == 5
  assert rows['teacher'] == ['90.00', '0.5000', '1.50', '', '']
  assert 'student, best by validation (step 1,000)' in rows
  assert text.endswith('- training: not measured')


def test_table_shows_the_student_without_its_moving_average():
  summary = make_summary()
  raw = summary['student']['last'] | {'top1': 0.65}
  summary['student']['last_without_ema'] = raw
  _, rows = read_table(report.table(summary))
  assert rows['student, last without EMA'][0] == '65.00'


@pytest.mark.parametrize(
  ('num_classes', 'shape'),
  [(2, (8, 8, 1)), (10, (32, 32, 3)), (100, (28, 56, 1)), (260, (8, 8, 3))],
)
def test_every_number_of_classes(tmp_path, num_classes, shape):
  case = make_case(num_classes, shape)
  text = write(tmp_path, **case)
  plots = {path.name for path in (tmp_path / 'plots').iterdir()}
  assert plots == {
    f'{name}.png' for name in ('losses', 'accuracy', 'confusion', 'images')
  }
  line = '| class 0 |      25.0 |      75.0 |          class 1 (3) |      4 |'
  assert line in text


def test_headline_and_circumstances(tmp_path):
  text = write(tmp_path, **make_case())
  # One image is won and three are lost: sqrt(0.4 - 0.2^2) / sqrt(10) = 0.1897,
  # times 1.96.
  assert (
    '**resnet8** gets **70.00%** of the 10 test images right, and the teacher '
    "**resnet20** 90.00%. The student has 38% of the teacher's parameters."
  ) in text
  assert (
    'The student was distilled by **ijckd** on **digits**, and predicts '
    "through the teacher's own head. The last step is bundled, and shown here. "
    'Student minus teacher: -20.00 points ± 37.19 '
  ) in text
  assert 'these images cannot tell which one is better' in text
  assert 'The student alone is right on 1, the teacher alone on 3.' in text
  assert 'gets 3 of 10 test images wrong, and the teacher is right on 3' in text
  assert report.table(make_summary()).split('\n\n')[0] in text
  assert "'Best' was chosen on the test set" in text
  assert '- seed 7, 2,000 steps' in text
  assert '- devices: 2 x cpu' in text
  assert '- versions: python 3.11, jax 0.10' in text
  assert '\noptimizer.learning_rate = 0.05\n' in text


def test_headline_names_the_state_that_is_bundled(tmp_path):
  summary = make_summary('srrl', best_by='validation')
  summary['config']['bundle'] = 'best'
  history = make_history(split='validation')
  text = write(tmp_path, **make_case(summary=summary, history=history))
  assert 'The best step is bundled, and shown here.' in text
  assert 'own head' not in text  # SRRL's student has a head of its own.
  assert 'was chosen on the test set' not in text


def test_student_that_only_is_compared_with_a_teacher(tmp_path):
  text = write(tmp_path, **make_case(summary=make_summary('ce')))
  assert (
    'The student was trained by **ce** on **digits**; the teacher is only '
    'there to compare with.'
  ) in text


def test_without_a_teacher(tmp_path):
  case = make_case(
    summary=make_summary('ce', teacher=False),
    history=make_history(['cross_entropy']),
  )
  alone = case['evaluation']
  case['evaluation'] = make_evaluation(
    case['arrays'].labels, alone.predictions, 2
  )
  case['arrays'].images[0] = MAGENTA
  text = write(tmp_path, **case)
  assert 'trained without a teacher by **ce**' in text
  assert 'The network gets 3 of 10 test images wrong' in text
  assert 'student' not in text.split('## Circumstances')[0]
  plots = epath.Path(tmp_path) / 'plots'
  assert not has_color(read_pixels(plots / 'accuracy.png'), plots_lib.TEACHER)
  assert has_color(read_pixels(plots / 'images.png'), MAGENTA)


def test_images_are_those_that_only_the_student_gets_wrong(tmp_path):
  case = make_case()
  labels, images = case['arrays'].labels, case['arrays'].images
  both = np.flatnonzero(labels == 1)[:1]
  for evaluation in (case['evaluation'], case['evaluation'].teacher):
    evaluation.predictions[both] = 0
  images[:3] = MAGENTA
  images[:3, :, 4:] = 0
  write(tmp_path, **case)
  pixels = read_pixels(epath.Path(tmp_path) / 'plots' / 'images.png')
  assert has_color(pixels, MAGENTA)
  assert not has_color(pixels, GREEN)
  for value in range(100, 150):  # Small images stay sharp when enlarged.
    assert not has_color(pixels, (value, 0, value))


def test_many_wrong_images_are_sampled_from_the_whole_split(tmp_path):
  labels = np.zeros(100, np.int32)
  images = np.zeros((100, 4, 4, 3), np.uint8)
  images[-1] = MAGENTA
  teacher = make_evaluation(labels, labels, 2)
  evaluation = make_evaluation(labels, labels + 1, 2, teacher)
  arrays = datasets.Arrays(images, labels)
  case = make_case(arrays=arrays, evaluation=evaluation)
  text = write(tmp_path, **case)
  assert '24 are shown' in text
  pixels = read_pixels(epath.Path(tmp_path) / 'plots' / 'images.png')
  assert has_color(pixels, MAGENTA)


@pytest.mark.parametrize('num_classes', [10, 100])
def test_nothing_wrong(tmp_path, num_classes):
  case = make_case(num_classes)
  labels = case['arrays'].labels
  teacher = make_evaluation(labels, labels, num_classes)
  case['evaluation'] = make_evaluation(labels, labels, num_classes, teacher)
  text = write(tmp_path, **case)
  assert 'gets 0 of 10 test images wrong' in text
  assert 'nothing to show' in text
  assert not (tmp_path / 'plots' / 'images.png').exists()
  pixels = read_pixels(epath.Path(tmp_path) / 'plots' / 'confusion.png')
  assert not has_color(pixels[: len(pixels) * 85 // 100], WORST)


@pytest.mark.parametrize('num_classes', [2, 260])
def test_errors_stand_out_in_the_matrix_of_the_one_who_made_them(
  tmp_path, num_classes
):
  case = make_case(num_classes)
  labels = case['arrays'].labels
  teacher = make_evaluation(labels, labels, num_classes)
  predictions = case['evaluation'].predictions
  case['evaluation'] = make_evaluation(
    labels, predictions, num_classes, teacher
  )
  write(tmp_path, **case)
  pixels = read_pixels(epath.Path(tmp_path) / 'plots' / 'confusion.png')
  without_bar = pixels[: len(pixels) * 85 // 100]
  # The student's above the teacher's. True classes go downwards: of two, the
  # first is the upper one.
  middle = len(pixels) * 25 // 100
  assert has_color(without_bar[:middle], WORST)
  assert not has_color(without_bar[middle:], WORST)


def test_curves(tmp_path):
  text = write(tmp_path, **make_case())
  plots = epath.Path(tmp_path) / 'plots'
  pixels = read_pixels(plots / 'losses.png')
  # Three terms: what is no loss takes no colour.
  drawn = [has_color(pixels, color) for color in plots_lib.TERMS]
  assert drawn == [True, True, True, False, False]
  assert has_color(pixels, plots_lib.INK)
  assert 'The scale is logarithmic.' in text
  assert '(cross_entropy 1, feature 1, logit 1)' in text
  pixels = read_pixels(plots / 'accuracy.png')
  for color in (plots_lib.STUDENT, plots_lib.TEACHER, plots_lib.GREY):
    assert has_color(pixels, color)


def test_curves_of_one_row_without_labels_and_of_losses_below_zero(tmp_path):
  history = make_history(['feature'])[:2]
  history[0] |= {'train/accuracy': float('nan'), 'train/feature': -3.0}
  summary = make_summary(steps=1000)
  text = write(tmp_path, **make_case(history=history, summary=summary))
  assert 'logarithmic' not in text


# Names that are more than text to Markdown, HTML, a terminal or a font, each
# beside what a reader is to see.
NAMES = {
  '![c0](x)': '![c0](x)',
  '<script>alert(1)</script>': '<script>alert(1)</script>',
  'a|b': 'a|b',
  '`x`': '`x`',
  '*b* _i_ __main__ ~s~ a_b': '*b* _i_ __main__ ~s~ a_b',
  '[y](https://example.org)': '[y](https://example.org)',
  '&amp; A & B': '&amp; A & B',
  '\\|': '\\|',
  '$\\frac{': '$\\frac{',
  '# h': '# h',
  '\x1b[31mred': '?[31mred',
  '\x9b31mred': '?31mred',
  '\x00': '?',
  'new\nline': 'new line',
  '\u202egnp.exe': '?gnp.exe',
  '\udcff': '?',
  '\U0001f600': '\U0001f600',
  'n' * 5000: 'n' * 59 + '…',
  '': '',
  'dup': 'dup',
  '../../etc/passwd': '../../etc/passwd',
}


class Shown(html.parser.HTMLParser):
  """What a browser shows of a page: its tags, and the text of its cells."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.cells, self._open = set(), [], False
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self._open = tag in ('td', 'th')
    if self._open:
      self.cells.append('')

  def handle_endtag(self, tag):
    self._open = False

  def handle_data(self, data):
    if self._open:
      self.cells[-1] += data


@pytest.fixture(scope='module')
def confused():
  """Arguments of `write`: a class of each of NAMES is taken for 'other'."""
  names = [*NAMES, 'dup', 'other']
  labels = np.arange(len(names), dtype=np.int32)
  teacher = make_evaluation(labels, labels, len(names))
  last = np.full_like(labels, len(names) - 1)
  return make_case(
    evaluation=make_evaluation(labels, last, len(names), teacher),
    arrays=datasets.Arrays(np.zeros((len(names), 8, 8, 3), np.uint8), labels),
    class_names=names,
  )


def test_names_are_text(tmp_path, confused):
  text = write(tmp_path, **confused)
  assert not [c for c in text if not (c.isprintable() or c == '\n')]
  page = Shown((tmp_path / 'report.html').read_text())
  start = page.cells.index('most often taken for') + 2
  rows = np.reshape(page.cells[start : start + 5 * tables.MAX_CLASSES], (-1, 5))
  assert [*rows[:, 0]] == [*NAMES.values()][: tables.MAX_CLASSES]
  assert {*rows[:, 3]} == {'other (1)'}
  assert not page.tags & {'script', 'em', 's', 'a'}


def test_names_are_drawn_as_text(tmp_path, confused, monkeypatch, recwarn):
  monkeypatch.setattr(plots_lib, 'MAX_NAMED', len(NAMES) + 2)
  write(tmp_path, **confused)
  assert not recwarn.list  # No font has all of their characters.


def test_fields_and_origins_are_text(tmp_path):
  summary = make_summary(
    teacher_name='[t](x)',
    devices=['<b>'],
    milliseconds={'student': {'1': 1.0}, 'teacher': {'1': 2.0}},
  )
  summary['teacher_origin'] = {'file': '![a](b).pth\x1b[2J', 'by': None}
  summary['config']['student']['backbone'] = '`m:N`'
  summary['config']['dataset']['data_dir'] = '</pre>\n```\n<i>\x1b'
  write(tmp_path, **make_case(summary=summary))
  page = (tmp_path / 'report.html').read_text()
  for said in (
    '<title>`m:N` by ijckd on digits</title>',
    '<h1>`m:N` by ijckd on digits</h1>',
    'file ![a](b).pth?[2J, by (none)',
    '1 x &lt;b&gt;',
    "dataset.data_dir = '&lt;/pre&gt;\\n```\\n&lt;i&gt;\\x1b'",
    'by JAX, as <code>ijckd predict</code> makes it, on one device of this run '
    '(&lt;b&gt;)',
  ):
    assert said in page
  assert '\x1b' not in page + (tmp_path / 'report.md').read_text()
  printed = report.table(summary)
  assert '- teacher \\[t](x): 20,000 parameters' in printed
  assert '- student \\`m:N\\`: 7,500 parameters' in printed


def test_size_and_speed_by_hand():
  summary = make_summary(
    multiply_adds={'student': 41e6, 'teacher': None},
    weight_bytes={'student': 30_000, 'teacher': 80_000},
    milliseconds={
      'student': {'1': 1.5, '64': 20.0},
      'teacher': {'1': 6.0, '64': 100.0},
    },
    training_seconds={'student': 754.0, 'teacher': 9000.0},
  )
  text = tables.size_and_speed(summary)
  titles, rows = read_table(text)
  assert titles == ['student', 'teacher', 'share']
  assert rows == {
    'parameters': ['7,500', '20,000', '37.5%'],
    'in the backbone': ['7,000', '19,900', '35.2%'],
    'in the connector': ['400', '0', ''],
    'in the head': ['100', '100', '100.0%'],
    'weights, MB': ['0.03', '0.08', '37.5%'],
    'multiply-adds for an image, M': ['41.0', '', ''],
    'one image, ms': ['1.50', '6.00', '25.0%'],
    '64 images, ms': ['20.00', '100.00', '20.0%'],
  }
  assert (
    "Training took 13 min, with evaluations and checkpoints. The teacher's "
    'training before it took 2.5 h. The training steps alone made 3,354 images '
    'per second.'
  ) in text
  assert 'on one device of this run (cpu)' in text


def test_size_and_speed_of_older_runs_and_without_a_teacher():
  text = tables.size_and_speed(make_summary('ce', teacher=False))
  titles, rows = read_table(text)
  assert titles == ['network']
  assert [*rows] == [
    *('parameters', 'in the backbone', 'in the connector', 'in the head')
  ]
  assert text.endswith(
    '\n\nThe training steps alone made 3,354 images per second.'
  )


def test_each_class_by_hand():
  labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2], np.int32)
  mine = np.array([0, 1, 2, 2, 1, 1, 2, 2, 0], np.int32)
  theirs = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2], np.int32)
  teacher = make_evaluation(labels, theirs, 4)
  names = ['a|b', 'b', 'c', 'never']
  evaluation = make_evaluation(labels, mine, 4, teacher)
  assert tables.classes(make_summary(), evaluation, names) == [
    ['class', 'student %', 'teacher %', 'most often taken for', 'images'],
    ['a\\|b', '25.0', '75.0', 'c (2)', '4'],
    ['c', '66.7', '100.0', 'a\\|b (1)', '3'],
    ['b', '100.0', '50.0', '', '2'],
  ]
  alone = make_evaluation(labels, mine, 4)
  rows = tables.classes(make_summary('ce', teacher=False), alone, names)
  assert rows[0] == ['class', 'network %', 'most often taken for', 'images']
  assert rows[1] == ['a\\|b', '25.0', 'c (2)', '4']


def test_many_classes_are_folded_away(tmp_path, confused):
  text = write(tmp_path, **confused)
  shown, folded = text.split('<details><summary>All 23 classes</summary>')
  assert '| dup ' in shown and '| other ' not in shown
  assert folded.count('other (1)') == 22 and '| other ' in folded
  page = Shown((tmp_path / 'report.html').read_text())
  assert page.cells.count('most often taken for') == 2


@pytest.mark.skipif(not test_web.CHROMIUM, reason='needs Chromium')
@pytest.mark.parametrize('width', [390, 1280])
def test_page_fits_the_screen(tmp_path, confused, width):
  """Nothing but tables and code is wider than a phone or a window."""
  from playwright import sync_api

  write(tmp_path, **confused)
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=test_web.CHROMIUM, args=list(test_web.FLAGS)
    )
    page = browser.new_page(viewport={'width': width, 'height': 844})
    page.goto((tmp_path / 'report.html').as_uri())
    page.evaluate(
      "document.querySelectorAll('details').forEach(x => { x.open = true })"
    )
    wide = page.evaluate(
      """[...document.querySelectorAll('body *')]
        .filter(x => x.getBoundingClientRect().right > innerWidth
          && !x.parentElement.closest('.wide, pre'))
        .map(x => x.outerHTML.slice(0, 80))"""
    )
    assert not wide
    assert page.evaluate('document.documentElement.scrollWidth') == width
    for plot in page.query_selector_all('img.plot'):
      assert plot.bounding_box()['width'] > 300
    browser.close()


def test_links_to_the_report_of_a_teacher_that_was_trained(tmp_path):
  (tmp_path / 'teacher').mkdir()
  (tmp_path / 'teacher' / 'report.md').write_text('its report')
  assert '(teacher/report.md)' in write(tmp_path, **make_case())
  page = (tmp_path / 'report.html').read_text()
  assert 'href="teacher/report.html"' in page


def test_settings_of_matplotlib_are_left_alone(tmp_path):
  with matplotlib.rc_context({'font.size': 17}):
    before = dict(matplotlib.rcParams)
    write(tmp_path, **make_case())
    assert dict(matplotlib.rcParams) == before
