"""Write the API reference to docs/api/ (or to the folder that is named), from the docstrings."""

import pkgutil
import sys
from pathlib import Path

import pdoc
import qwt_mmdet
from qwt_mmdet import *  # noqa: F403  so that pdoc finds what the package imports only when asked

output = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "api")
# By name, since pdoc leaves out modules that a package's __all__ does not list.
modules = [m.name for m in pkgutil.iter_modules(qwt_mmdet.__path__, "qwt_mmdet.")]
pdoc.render.configure(docformat="google")
pdoc.pdoc("qwt_mmdet", *modules, output_directory=output)
print(f"API reference: {output / 'index.html'}")
