"""Write the API reference, from the docstrings, into a folder: python tools/api.py FOLDER"""

import sys
from pathlib import Path

import pdoc

from cifar_fastai import *  # noqa: F403  pdoc finds only what is imported already

pdoc.render.configure(show_source=False, footer_text="cifar_fastai")
pdoc.pdoc("cifar_fastai", output_directory=Path(sys.argv[1]))
