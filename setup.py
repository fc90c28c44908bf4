"""The compiled module lddyn._C and the package map; all metadata is in pyproject.toml.

csrc/*.cpp (C++ compiler) and csrc/*.cu (nvcc) are built by one ninja file; no torch is needed, the
module takes raw pointers. LDDYN_CUDA=auto|0|1 chooses the CUDA part (auto: if nvcc is found), and
LDDYN_CUDA_ARCHS="80 90 100" its targets, the last one also as PTX.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.absolute()
CSRC = ROOT / "csrc"
ARCHS = os.environ.get("LDDYN_CUDA_ARCHS", "80 90 100").replace(",", " ").split()


def readme():
    """README.md for places outside the repository: no pictures, links as the names of files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", text)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)([^)#]*)[^)]*\)", r"\1 (`\2`)", text)


def find_nvcc():
    """Command of nvcc, or None with a printed line; LDDYN_CUDA=1 makes its absence an error."""
    wish, home = os.environ.get("LDDYN_CUDA", "auto"), os.environ.get("CUDA_HOME")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"LDDYN_CUDA must be auto, 0 or 1, got {wish!r}")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if wish == "1" and not nvcc:
        sys.exit("LDDYN_CUDA=1 but nvcc was not found: put it on PATH, or set CUDA_HOME")
    if wish == "0" or not nvcc:
        print(f"lddyn: building without CUDA (LDDYN_CUDA={wish}, nvcc: {nvcc or 'not found'})")
    return nvcc if wish != "0" else None


class NinjaBuild(build_ext):
    """Writes build.ninja for the one extension and runs it; a compile error fails the install."""

    def build_extension(self, ext):
        """Compile and link, incrementally in an editable install."""
        from ninja import BIN_DIR, ninja_syntax
        from pybind11 import get_include

        cxx, nvcc = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"), find_nvcc()
        if cxx is None:
            print("lddyn: no C++ compiler found, lddyn._C is skipped (plain torch does its work)")
            return
        paths = self.get_ext_fullpath(ext.name), self.build_temp
        target, build = (Path(path).absolute() for path in paths)
        for folder in (target.parent, build):
            folder.mkdir(parents=True, exist_ok=True)
        common = f"-std=c++17 -O3 -isystem {sysconfig.get_path('include')} -isystem {get_include()}"
        common += f' -DLDDYN_CUDA_ARCHS="\\"{" ".join(ARCHS) if nvcc else ""}\\""'
        common += " -DLDDYN_CUDA" if nvcc else ""
        host = "-fPIC -fvisibility=hidden -fopenmp"
        codes = [f"-gencode arch=compute_{a},code=sm_{a}" for a in ARCHS]
        codes.append(f"-gencode arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        gpu = f"{' '.join(codes)} -Xcompiler {host.replace(' ', ',')}"
        with (build / "build.ninja").open("w") as file:
            out, path, objects = ninja_syntax.Writer(file, 400), ninja_syntax.escape_path, []
            dep = {"depfile": "$out.d", "deps": "gcc"}
            out.rule("cxx", f"{cxx} {common} {host} -Wall -MMD -MF $out.d -c $in -o $out", **dep)
            out.rule("nvcc", f"{nvcc} {common} {gpu} -MMD -MF $out.d -c $in -o $out", **dep)
            link = f"{nvcc} -shared -cudart static -Xlinker -s" if nvcc else f"{cxx} -shared -s"
            out.rule("link", f"{link} $in -o $out {'-Xcompiler ' if nvcc else ''}-fopenmp")
            for source in sorted([*CSRC.glob("*.cpp"), *(CSRC.glob("*.cu") if nvcc else ())]):
                rule = "nvcc" if source.suffix == ".cu" else "cxx"
                objects += out.build(f"{source.name}.o", rule, path(str(source)))
            out.build(path(str(target)), "link", objects)
        subprocess.run([str(Path(BIN_DIR) / "ninja"), "-C", str(build)], check=True)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["lddyn", "lddyn.*"]), "lddyn.kernels"],
    package_dir={"lddyn.kernels": "kernels"},
    package_data={"lddyn": ["py.typed"], "lddyn.report": ["templates/*"]},
    # Optional means "may be absent" (no compiler); an error of ninja is raised all the same.
    ext_modules=[Extension("lddyn._C", [], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
