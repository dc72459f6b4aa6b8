"""Copy recipes/ into the package as `subnet_ft/recipes` at build time; everything else is in pyproject.toml.

An editable install needs no copy: the package then reads the repository's own recipes/.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Build the packages, then put the recipes beside them."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for source in sorted(Path("recipes").rglob("*")):
            if source.suffix in {".yaml", ".md"}:
                target = Path(self.build_lib, "subnet_ft", source)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithRecipes})
