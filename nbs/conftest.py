"""`pytest nbs` runs every notebook as `nbdev_test` does, with a result of its own for each. Bare `pytest` leaves them to `nbdev_test`."""
import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and not file_path.name.startswith("_") and not (file_path.parent/".notest").exists():
        return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name=self.path.stem)


class NotebookItem(pytest.Item):
    def runtest(self):
        cfg = get_config()
        passed, _ = run_notebook(self.path, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
        if not passed: pytest.fail("a cell of this notebook fails; its traceback is in the captured stderr", pytrace=False)

    def reportinfo(self):
        return self.path, None, self.name
