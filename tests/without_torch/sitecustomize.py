"""On the path of the mains that tests start: torch is not found there, as it is not where users run them."""

import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


sys.meta_path = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
