"""Replies and prompts as HTML that holds nothing of theirs but text: no script, link or image.

markdown-it-py with HTML off escapes every tag; links and images become text with their address, so
nothing is fetched and no click leads away.
"""

import functools
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token

from run_folder.output import printable


def to_html(text: str) -> str:
    """A text in Markdown as HTML."""
    return _renderer().render(printable(text).strip())


@functools.cache
def _renderer() -> MarkdownIt:
    options = {"html": False, "linkify": False, "breaks": True}
    made = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
    made.add_render_rule("link_open", _link_open)
    made.add_render_rule("link_close", _link_close)
    made.add_render_rule("image", _image)
    made.add_render_rule("fence", _fence)
    return made


# markdown-it-py calls a rule with the renderer first.


def _link_open(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return '<span class="link">'


def _link_close(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    opened = _opening(tokens, index)
    address = str(opened.attrs.get("href", "")) if opened else ""
    if opened is not None and opened.info == "auto":
        return "</span>"
    return f'</span> <span class="address">({escapeHtml(address)})</span>'


def _opening(tokens: Sequence[Token], index: int) -> Token | None:
    """The token that opens the link which ends here; links do not nest."""
    return next((t for t in reversed(tokens[:index]) if t.type == "link_open"), None)


def _image(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    text = escapeHtml(token.content)
    address = escapeHtml(str(token.attrs.get("src", "")))
    return f'<span class="link">[image: {text}]</span> <span class="address">({address})</span>'


def _fence(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """Code without a class of the language that a reply names."""
    return f"<pre><code>{escapeHtml(tokens[index].content)}</code></pre>\n"
