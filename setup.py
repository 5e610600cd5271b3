"""The part of the package build that pyproject.toml cannot say: the native CPU kernels.

Where a C++ compiler is at hand a wheel carries the compiled kernels; without one it is pure Python
and compiles them at first use. OCTAVO_NO_NATIVE_BUILD=1 leaves them out.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# As a source distribution has them, too: there src/octavo holds folders, not links.
KERNELS = Path(__file__).parent / "src" / "octavo" / "kernels" / "cpu"


def native_build() -> ModuleType:
    """Return kernels/cpu/build.py, loaded by path: the package is not installed yet."""
    spec = importlib.util.spec_from_file_location("octavo_native_build", KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_compiler() -> bool:
    """Whether the kernels are built into the wheel."""
    return not os.environ.get("OCTAVO_NO_NATIVE_BUILD") and any(map(shutil.which, ("c++", "g++", "clang++")))


class BuildPython(build_py):
    """Copies the modules, then compiles the kernels beside them."""

    def run(self) -> None:
        """Build, unless the install is editable: then the kernels are compiled at first use."""
        super().run()
        if has_compiler() and not self.editable_mode:
            native_build().build_into(Path(self.build_lib) / "octavo" / "kernels" / "cpu")


class PlatformWheel(bdist_wheel):
    """Tags a wheel with compiled kernels for its platform, and for every Python: they do not use its API."""

    def finalize_options(self) -> None:
        """Decide whether the wheel is pure."""
        super().finalize_options()
        self.root_is_pure = not has_compiler()

    def get_tag(self) -> tuple[str, str, str]:
        """Return (python, abi, platform)."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if has_compiler() else (python, abi, platform)


setup(cmdclass={"build_py": BuildPython, "bdist_wheel": PlatformWheel})
