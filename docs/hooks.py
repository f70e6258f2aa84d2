"""What pages link to outside of docs/ comes along into the site: results of benchmarks, recipes, the house rules.

Files keep their place in the repository, so `../benchmarks/x.json` in a page is `benchmarks/x.json` in the site.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
TAKEN = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/*", "examples/recipes/*.yaml")
LINK = re.compile(r"\]\(((?:\.\./)+)([^)]*)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that lie outside of docs/."""
    for pattern in TAKEN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ lead to the copies; those that come back into docs/ do as well."""
    up = "../" * page.file.src_uri.count("/")
    inside = page.file.src_uri.startswith("benchmarks/")

    def target(match: re.Match[str]) -> str:
        steps, rest = match[1], match[2]
        if inside:
            return f"]({steps}{rest.removeprefix('docs/')})"
        if rest == "examples/recipes":  # a folder: it has no page in the site
            return f"]({up}recipes.md)"
        return f"]({up}{rest})" if steps == "../" + up else match[0]

    return LINK.sub(target, markdown)
