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

from lddyn.files import LARGEST_RECORD, append_text, read_regular, replace_file, sealed, unsealed
from lddyn.probes.build import joined_like
from lddyn.probes.probe_set import ProbeSet

__all__ = ["Endpoint", "write"]

_SYSTEM = "You are a helpful assistant."

# The paper's own messages (appendix, Fig. 11).
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

# Response type: (the field it is made from, the message).
_WRITTEN = {
    "chosen_gptsemantic": ("chosen", _KEEP_MEANING),
    "chosen_gptformat": ("chosen", _KEEP_FORMAT),
    "reject_gptsemantic": ("rejected", _KEEP_MEANING),
    "reject_gptformat": ("rejected", _KEEP_FORMAT),
    "irr_hum": ("chosen", _SENTENCE),
}


@dataclass(frozen=True)
class Endpoint:
    """A chat service with OpenAI's interface. There is no default: the user names it.

    Attributes:
        url: Address without /chat/completions, such as "http://localhost:8000/v1".
        model: Name of the model at the service.
        key_variable: Environment variable with the key of the service. Empty: no key is sent.
        temperature: Sampling temperature; the paper's is 0.7.
        timeout: Seconds after which an attempt counts as failed.
        attempts: Most attempts of a request that fails for a passing reason: no connection,
            timeout, status 408, 429 or 5xx.
        wait: Seconds before the second attempt; each further wait is twice as long.

    Raises:
        ValueError: If the address is not http or https.
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
        """The service's answer to one message.

        Raises:
            RuntimeError: If the environment has no key, if the service refuses, if its answer is
                no chat completion, or if all attempts fail.
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
    progress: Progress | None = None,
) -> ProbeSet:
    """Let the service write the responses that are missing.

    Args:
        probes: A probing set; the responses that it has are kept.
        endpoint: The service. The texts of "chosen" and "rejected" are sent to it.
        journal: JSONL file to which each answer is appended as it comes. After an interruption,
            the same call asks only for the rest.
        fields: Response types to write.
        progress: Wraps the list of requests and a label in a progress bar.

    Returns:
        The set with the written responses.

    Raises:
        ValueError: If a field is not among those that a service writes, or the journal is damaged.
        RuntimeError: If the service fails; the journal keeps the answers so far.

    Cost: one request for each missing response.
    """
    unknown = [name for name in fields if name not in _WRITTEN]
    if unknown:
        raise ValueError(f"fields must be among {', '.join(_WRITTEN)}, got {unknown}")
    requests = _missing(probes, endpoint, fields)
    rows = [dict(row) for row in probes.rows]
    journal = Path(journal)
    answers = _read_journal(journal)
    journal.parent.mkdir(parents=True, exist_ok=True)
    for request in progress(requests, "asking") if progress else requests:
        if request.key not in answers:
            answers[request.key] = endpoint.ask(request.text)
            line = {"key": request.key, "text": answers[request.key]}
            append_text(journal, sealed(line, indent=None))
        row = rows[request.row]
        row[request.field] = joined_like(row["chosen"], answers[request.key].split(" "))
    return ProbeSet(rows)


@dataclass(frozen=True)
class Request:
    """One response that the service is to write.

    Attributes:
        row: Index of the row.
        field: Response type.
        text: Message to the service.
        key: Digest of the request, under which the journal keeps the answer.
    """

    row: int
    field: str
    text: str
    key: str


Progress = Callable[[list[Request], str], Iterable[Request]]


def _missing(probes: ProbeSet, endpoint: Endpoint, fields: Sequence[str]) -> list[Request]:
    """A request for each response that a row lacks and whose source it has."""
    requests = []
    for index, row in enumerate(probes.rows):
        for name in fields:
            source, template = _WRITTEN[name]
            if row.get(name) or not row.get(source):
                continue
            text = template.format(text=row[source].strip(), words=len(row[source].split()))
            content = json.dumps([index, name, text, endpoint.model, endpoint.temperature])
            key = hashlib.sha256(content.encode()).hexdigest()
            requests.append(Request(index, name, text, key))
    return requests


def _read_journal(path: Path) -> dict[str, str]:
    """Answers by key; a last line without its end is removed from the file.

    Raises:
        ValueError: If another line has changed since it was written.
    """
    if not path.exists():
        return {}
    *lines, end = read_regular(path, limit=LARGEST_RECORD).split(b"\n")
    answers = {}
    for number, line in enumerate(lines, 1):
        entry = unsealed(line, f"{path}: line {number}")
        if not all(isinstance(entry.get(name), str) for name in ("key", "text")):
            raise ValueError(f"{path}: line {number} holds no answer of a service")
        answers[entry["key"]] = entry["text"]
    if end:
        replace_file(path, b"".join(line + b"\n" for line in lines))
    return answers
