"""Build geolab from settings.ini, the one place that names its version and requirements."""
import configparser
import shlex
from pathlib import Path

from setuptools import find_packages, setup

parser = configparser.ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

EXTRAS = ["cluster", "track", "sweep", "foundation", "fast", "compare", "notebook"]
STATUSES = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}


def specs(key):
    return shlex.split(cfg[f"{key}_requirements"])


extras = {name: specs(name) for name in EXTRAS}
extras["dev"] = [spec for name in EXTRAS for spec in extras[name]] + specs("dev")

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    packages=find_packages(include=["geolab", "geolab.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    classifiers=[
        f"Development Status :: {STATUSES[cfg['status']]}",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: GIS",
    ],
    include_package_data=True,
    zip_safe=False,
)
