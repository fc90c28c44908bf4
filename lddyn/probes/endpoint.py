"""Paraphrases written by another model, through an HTTP endpoint that the user names."""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lddyn.files import replace_file
from lddyn.probes.build import like
from lddyn.probes.probe_set import ProbeSet

__all__ = ["Endpoint", "write"]

_SYSTEM = "You are a helpful assistant."

# The paper's own words (App., Fig. 11).
_KEEP_MEANING = (
    "Given the reference sentence, please generate an output sentence. Please use different words "
    "as much as possible while keeping the meaning of the reference sentence unchanged. Please "
    "only return the output sentence.\n\nReference sentence: {text}\n\nOutput: "
)

_KEEP_FORMAT = (
    "Given the reference sentence, please generate an output sentence. Please change the meaning "
    "of the reference sentence as much as possible while keeping the format of it. Please only "
    "return the output sentence.\n\nReference sentence: {text}\n\nOutput: "
)

_SENTENCE = "Please generate a random sentence with {words} words."

# field: (the field it is made from, what is asked)
_WRITTEN = {
    "chosen_gptsemantic": ("chosen", _KEEP_MEANING),
    "chosen_gptformat": ("chosen", _KEEP_FORMAT),
    "reject_gptsemantic": ("rejected", _KEEP_MEANING),
    "reject_gptformat": ("rejected", _KEEP_FORMAT),
    "irr_hum": ("chosen", _SENTENCE),
}


@dataclass(frozen=True)
class Endpoint:
    """A chat service with OpenAI's interface, named by the user: there is no default.

    Attributes:
        url: Up to and without /chat/completions: "http://localhost:8000/v1".
        model: Its name there.
        key_variable: Environment variable that holds the key; empty: none is sent.
        temperature: The paper's 0.7.
        timeout: Seconds until an attempt is given up.
        attempts: How often a request is tried that failed for a passing reason: no connection,
            time over, status 408, 429 or 5xx.
        wait: Seconds before the second attempt; doubled each time.
    """

    url: str
    model: str
    key_variable: str = ""
    temperature: float = 0.7
    timeout: float = 60.0
    attempts: int = 5
    wait: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the endpoint must be an http(s) address, got {self.url!r}")

    def ask(self, text: str) -> str:
        """The answer to one message.

        Raises:
            RuntimeError: If the service refuses, or answers with something else; or keeps failing.
        """
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            if not os.environ.get(self.key_variable):
                raise RuntimeError(f"the environment has no key under {self.key_variable}")
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        body = {
            "model": self.model,
            "temperature": self.temperature,
            "messages": [
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": text},
            ],
        }
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    document = json.load(reply)
                return str(document["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}"
                if error.code not in (408, 429) and error.code < 500:
                    raise RuntimeError(f"{self.url} refused the request: {problem}") from None
            except (OSError, TimeoutError) as error:
                problem = str(error)
            except (ValueError, LookupError, TypeError) as error:
                raise RuntimeError(
                    f"{self.url} did not answer as a chat service does: {error!r}"
                ) from None
        raise RuntimeError(f"{self.url} failed {self.attempts} times, at last: {problem}")


def write(
    probes: ProbeSet,
    endpoint: Endpoint,
    journal: str | os.PathLike[str],
    *,
    fields: Sequence[str] = tuple(_WRITTEN),
    bar: Callable[[list[Any], str], Iterable[Any]] | None = None,
) -> ProbeSet:
    """Has the service write the responses that are missing.

    Args:
        probes: A set; what it has is kept.
        endpoint: Who is asked. The text of "chosen" and "rejected" is sent there.
        journal: JSONL to which every answer is appended as it comes: run again after an
            interruption, it asks only for the rest.
        fields: Which types.
        bar: Wraps a list of requests and a label in a progress bar.

    Returns:
        The set, complete.

    Raises:
        ValueError: If a field is not one that is written so.
        RuntimeError: If the service fails; the journal keeps what there is.
    """
    unknown = [name for name in fields if name not in _WRITTEN]
    if unknown:
        raise ValueError(f"fields must be among {', '.join(_WRITTEN)}, got {unknown}")
    journal = Path(journal)
    known: dict[str, str] = {}
    if journal.exists():
        text = journal.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a line that was cut short is asked for again
        for line in whole.splitlines():
            entry = json.loads(line)
            known[entry["key"]] = entry["text"]
        if whole != text:
            replace_file(journal, whole)
    requests = []
    for index, row in enumerate(probes.rows):
        for name in fields:
            source, template = _WRITTEN[name]
            if row.get(name) or not row.get(source):
                continue
            asked = template.format(text=row[source].strip(), words=len(row[source].split()))
            content = json.dumps([index, name, asked, endpoint.model, endpoint.temperature])
            requests.append((index, name, asked, hashlib.sha256(content.encode()).hexdigest()))
    rows = [dict(row) for row in probes.rows]
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as out:
        for index, name, asked, key in bar(requests, "asking") if bar else requests:
            if key not in known:
                known[key] = endpoint.ask(asked)
                out.write(json.dumps({"key": key, "text": known[key]}) + "\n")
                out.flush()
            rows[index][name] = like(rows[index]["chosen"], known[key].split(" "))
    return ProbeSet(rows)
