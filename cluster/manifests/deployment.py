"""A program and the machines that it runs on, as the manifests render them.

    Deployment              KubeRay            Slurm              ray up
      program, file         entrypoint         last command       `ray exec`
      head                  headGroupSpec      first node         head_node_type
      workers, by group     workerGroupSpecs   the other nodes    available_node_types

Nothing here says what the program does.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

POOL_LABEL = "sgmd-pool"
"""Node label by which a pool finds its machines."""

_NOT_IN_NAMES = re.compile(r"[^a-z0-9-]+")
_MOST_NAME = 40  # Kubernetes adds to it, up to 63 characters


@dataclass(frozen=True, slots=True)
class MachineGroup:
    """Machines of one kind.

    Attributes:
        name: Name of the group.
        count: Machines.
        cpus: CPUs of each that Ray hands out.
        gpus: GPUs of each.
        memory_gb: Main memory of each, in GB.
        labels: Ray's labels of each.
        resources: Custom resources of each.
        nodes: Labels of the Kubernetes nodes that they may run on; {} for any.
    """

    name: str
    count: int
    cpus: int
    gpus: int
    memory_gb: int
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    nodes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A program on a cluster.

    Attributes:
        name: Name of both.
        program: Command, with `FILE_PATH` for its file.
        file: Content of the file that the command reads.
        head: The machine of Ray's head and of the program itself.
        workers: The other machines.
        ray_version: Version of Ray in the image.
        image: Container image with the program.
        environment: Variables without secrets.
        secrets: Names of variables that hold secrets.
        stop_after_s: Time that the program needs to save its state when it is told to stop.
        made_by: Command that made the manifest, for its first line.
    """

    name: str
    program: Sequence[str]
    file: str
    head: MachineGroup
    workers: Sequence[MachineGroup]
    ray_version: str
    image: str
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    stop_after_s: int = 300
    made_by: str = ""

    def command(self, path: str) -> list[str]:
        """The program's words, with the path of its file."""
        return [path if word == FILE_PATH else word for word in self.program]


FILE_PATH = "{file}"
"""Stands for the path of the program's file in `Deployment.program`."""


def dns_name(name: str) -> str:
    """A name that Kubernetes and clouds take: lower case letters, digits and hyphens."""
    plain = _NOT_IN_NAMES.sub("-", name.lower()).strip("-")[:_MOST_NAME].strip("-")
    return plain if plain and plain[0].isalpha() else f"run-{plain}".strip("-")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are, and one object twice instead of an alias."""

    def ignore_aliases(self, data: object) -> bool:
        """No anchors: a reader need not look for them."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else "")


_Dumper.add_representer(str, _text)


def commented(text: str) -> str:
    """A text as a comment of a shell script, Dockerfile or YAML: no line of it is left outside."""
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def filled_in(template: str, **words: object) -> str:
    """A template of `assets` with its words; nothing is escaped, and a missing one is an error."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "assets"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return templates.get_template(template).render(words)


def yaml_documents(comment: str, *documents: Mapping[str, object]) -> str:
    """Documents of one YAML file, below a comment."""
    parts = [
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
        for document in documents
    ]
    return f"{commented(comment)}\n" + "---\n".join(parts)
