"""report.md: the table and its limits, for a pull request or a wiki."""

import re
from typing import Any

from labelwise.reports import text


def render(document: dict[str, Any]) -> str:
    """Write a report as Markdown."""
    lines = ["# Labelwise report", "", escape(document["verdict"]), ""]
    if document["summary"]:
        columns, rows = text.table(document)
        lines += [
            *write_table(columns, rows),
            "",
            text.table_note(document),
            "",
            *(f"- {text.over_encoders_in_words(gain)}" for gain in document["over_encoders"]["gains"]),
            *(
                f"- {text.saved_in_words(saved, document['label_cost'])}"
                for saved in document["labels_saved"]
            ),
            "",
        ]
    lines += [
        "## Data",
        "",
        f"- {text.data_line(document['data'])}",
        f"- test: {text.test_line(document)}",
        "",
    ]
    for words in (text.grouped_in_words(document["data"]), text.lookalikes_in_words(document)):
        if words:
            lines[-1:] = [f"- {words}", ""]
    check = document["label_check"]
    if check:
        lines += [
            "## Labels to look at again",
            "",
            f"{escape(text.doubts_in_words(check))}. {text.check_note(document)}",
            "",
        ]
        lines += [
            f"- {escape(each['name'])}: {escape(text.suspicion_in_words(each))}" for each in check["suspects"]
        ] + [""]
    if document["studies"]:
        lines += ["## The paper's findings on these images", ""]
        lines += [
            f"- {escape(each['advice'])} ({each['study']}, {escape(each['folder'])})"
            for each in document["studies"]
        ] + [""]
    lines += [
        "## What these numbers do not say",
        "",
        *(f"- {escape(limit)}" for limit in document["limits"]),
        "",
    ]
    lines += [
        "## Commands",
        "",
        *(f"    {' '.join(entry['command'].splitlines())}" for entry in document["environment"]["commands"]),
        "",
    ]
    return "\n".join(lines)


def write_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(escape(cell) for cell in row) + " |"
        for row in (columns, ["---"] * len(columns), *rows)
    ]


def escape(words: str) -> str:
    """Text that is shown as it is: no line end, table, link, code or HTML of its own."""
    one_line = " ".join(words.splitlines())
    return re.sub(r"([\\`|\[\]])", r"\\\1", one_line).replace("<", "&lt;")
