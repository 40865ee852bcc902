"""Builds the one Cython module; everything else is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

# GATEWAY_CFLAGS lets the fuzz and sanitizer builds add their own flags.
flags = ["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", *os.environ.get("GATEWAY_CFLAGS", "").split()]

setup(
    ext_modules=cythonize(
        [
            Extension(
                "gateway._parser",
                ["gateway/_parser.pyx"],
                extra_compile_args=flags,
                extra_link_args=os.environ.get("GATEWAY_LDFLAGS", "").split(),
            )
        ],
        compiler_directives={"language_level": 3, "boundscheck": False, "wraparound": False, "freethreading_compatible": True},
    )
)
