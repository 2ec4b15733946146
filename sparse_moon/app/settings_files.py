"""Files of settings, in YAML."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """As the command line reads YAML: ``1e-1`` is a number, too; and nothing is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [str(name) for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is set twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_settings(text: str) -> Any:
    """What a file of settings holds.

    Raises:
        yaml.YAMLError: no YAML.
        ValueError: a name that is set twice.
    """
    return yaml.load(text, _Loader)
