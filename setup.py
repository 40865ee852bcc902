"""Builds what is compiled; everything else is in pyproject.toml.

``gateway/_parser.pyx`` and the two of the load tools are Cython. The files of ``RULES`` are ordinary Python that mypyc compiles as they
stand: with ``GATEWAY_PURE=1`` they are left to the interpreter, and do the same, slower.
"""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from mypyc.build import mypycify
from setuptools import Extension, setup

#: What every message passes, and the values it is made of (docs/performance.md). Each paragraph becomes one library: within it
#: calls are direct, and short functions vanish into who calls them; two are compiled at the same time.
RULES = """
reply message route contracts observe intake queue listener net/secure net/turn sinks/discard
smtp/auth smtp/conversation smtp/esmtp smtp/events smtp/extensions smtp/judge smtp/order smtp/replies smtp/server
smtp/submission smtp/trace smtp/xclient

smtp/client sinks/relay net/direct net/signature sinks/webhook
mime/words mime/fields mime/parts mime/formats/payload mime/formats/raw mime/formats/standard
spool/engine spool/records spool/sqlite
"""

# GATEWAY_CFLAGS lets the fuzz and sanitizer builds add their own flags.
flags = ["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", *os.environ.get("GATEWAY_CFLAGS", "").split()]

octets = cythonize(
    [
        Extension(
            name,
            [name.replace(".", "/") + ".pyx"],
            extra_compile_args=flags,
            extra_link_args=os.environ.get("GATEWAY_LDFLAGS", "").split(),
        )
        for name in ("gateway._parser", "gateway.tools._sink", "gateway.tools._wire")
    ],
    compiler_directives={"language_level": 3, "boundscheck": False, "wraparound": False, "freethreading_compatible": True},
)

libraries = [] if os.environ.get("GATEWAY_PURE") else [[f"gateway/{name}.py" for name in part.split()] for part in RULES.split("\n\n")]
rules = (
    []
    if not libraries
    else mypycify(
        # Of types alone: whoever builds a wheel has not installed what the other files import. `make check` is strict.
        [
            "--config-file=",
            f"--cache-dir={os.devnull}",  # with one, mypyc 2.4 fails on what it kept of another build
            "--ignore-missing-imports",
            "--follow-imports=silent",
            *(file for files in libraries for file in files),
        ],
        opt_level="2",
        separate=[(files, f"gateway.rules{number}") for number, files in enumerate(libraries, 1)],
    )
)

for module in rules:
    # A warning of somebody's newer compiler is no reason to have no gateway.
    module.extra_compile_args = [flag for flag in module.extra_compile_args if flag != "-Werror"]
    # But this one says that a value is taken for another: docs/performance.md, "What to mind in a compiled file".
    module.extra_compile_args += ["-Werror=int-conversion", "-g0"]
    if sys.platform == "linux":
        # Calls of Python's own functions without the detour; and functions that other libraries may call are inlined all the same.
        module.extra_compile_args += ["-fno-plt", "-fno-semantic-interposition"]

if "--inplace" in sys.argv:
    # What is no longer compiled must not stand in the way of its source.
    wanted = {module.name for module in octets + rules}
    for library in Path("gateway").rglob("*.so"):
        if ".".join([*library.parent.parts, library.name.partition(".")[0]]) not in wanted:
            library.unlink()

setup(ext_modules=octets + rules, options={"build_ext": {"parallel": 2}})
