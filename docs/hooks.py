"""Pictures that benchmarks wrote: pages link them where they lie, the site has copies."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = "../benchmarks/results/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures to the site."""
    for picture in sorted((Path(config.docs_dir) / RESULTS).glob("*.png")):
        files.append(
            File.generated(config, f"img/{picture.name}", abs_src_path=str(picture.resolve()))
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where the site has them."""
    return markdown.replace(f"]({RESULTS}", "](img/")
