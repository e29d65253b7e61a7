"""House rules: file sizes, circles of imports."""

from tests import house


def test_no_file_is_long():
  files = house.files(*house.PACKAGES)
  long = [x.name for x in files if house.num_lines(x) > house.LONGEST_FILE]
  assert long == []
  assert house.num_lines(house.ROOT / "mtp_jax" / "train.py") <= house.LONGEST_LOOP


def test_imports_have_no_circle():
  assert house.import_circle() == []
