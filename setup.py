"""Which packages there are; pyproject.toml says the rest."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["xkv", "xkv.*"]),
        *(f"xkv.{name}" for name in find_packages(include=["backends", "backends.*"])),
    ]
)
