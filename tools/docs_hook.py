"""A hook of mkdocs: rewrites the two things in the pages that GitHub shows and mkdocs does not."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Rewrite the Markdown of one page.

    A block that no test can run has a mark after its language, "```bash needs=weights". The parser
    of mkdocs does not know such marks. A link to a file outside docs/ has no target on the site, so
    only its text stays."""
    markdown = re.sub(r"^( *```\w+) needs=\S+ *$", r"\1", markdown, flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
