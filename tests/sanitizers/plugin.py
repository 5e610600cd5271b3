"""A plugin of pytest, `-p tests.sanitizers.plugin`: the kernels are compiled with a sanitizer, in one variant alone."""

from __future__ import annotations

import os

from octavo.kernels.cpu import build, library

_FLAGS = os.environ["OCTAVO_SANITIZER_FLAGS"].split()
_VARIANT = os.environ["OCTAVO_SANITIZER_VARIANT"]

build.COMMON_FLAGS = (*(flag for flag in build.COMMON_FLAGS if flag != "-O3"), *_FLAGS)
build.STATIC_FLAGS = ()
library.runnable_variants = lambda: [_VARIANT]
build.library_path(_VARIANT)  # now: compiled in a test, it would count as the test's time
