"""What the build makes: the gallery of masks, the table of implementations, and the colours of code."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for gallery, and the library beside it
sys.path.insert(1, str(Path(__file__).parent.parent))

import gallery
from mkdocs.structure.files import File
from pygments.formatters import HtmlFormatter

WRITERS = {"<!-- gallery -->": gallery.masks_page, "<!-- implementations -->": gallery.implementations_table}


def on_files(files, config):
    """Adds the pictures and the style sheet to the files of the site."""
    made = {f"pictures/{name}.svg": content for name, content in gallery.pictures()}
    made["pygments.css"] = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, **_):
    """Puts what is generated in the place of its marker."""
    for marker, write in WRITERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, write())
    return markdown
