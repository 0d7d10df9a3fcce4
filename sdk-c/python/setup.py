"""Builds the extension against the static C library, so that the wheel needs no library beside it.

AGS_SDK_DIR names a folder with argo_streams.h and libargo_streams.a; without it they come from the checkout that this file lies
in, or from where `make install` put them, by pkg-config.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup


def sdk():
    """The folder of the header and the static library."""
    here = Path(__file__).resolve().parent
    named = os.environ.get("AGS_SDK_DIR")
    if named:
        places = [(Path(named), Path(named))]
    else:
        places = [(here.parent / "include", here.parent.parent / "target" / "release")]
        try:
            asked = [
                subprocess.run(["pkg-config", f"--variable={what}", "argo-streams"], capture_output=True, text=True, check=True).stdout.strip()
                for what in ("includedir", "libdir")
            ]
            places.append((Path(asked[0]), Path(asked[1])))
        except (OSError, subprocess.CalledProcessError):
            pass
    for include, library in places:
        if (include / "argo_streams.h").is_file() and (library / "libargo_streams.a").is_file():
            return include, library / "libargo_streams.a"
    looked = ", ".join(f"{include} and {library}" for include, library in places)
    sys.exit(
        f"argo-streams: no argo_streams.h with libargo_streams.a in {looked}. Build it in the checkout "
        "(cargo build --release -p argo-streams-sdk-c), or install it (make sdk-install), or name its folder by AGS_SDK_DIR."
    )


include, library = sdk()
setup(
    ext_modules=[
        Extension(
            "argo_streams",
            ["argo_streams.c"],
            include_dirs=[str(include)],
            extra_objects=[str(library)],
            depends=[str(library)],
            libraries=["gcc_s", "pthread", "dl", "m"],
            extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wno-unused-parameter", "-Wno-cast-function-type"],
        )
    ],
)
