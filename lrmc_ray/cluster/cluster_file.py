"""What a cluster file for ``ray up`` must say to be safe, and how many workers it brings.

Ray's own validation (``lrmc doctor --cluster`` runs it) looks at the form. Here are the rules that
it does not know: nothing but ssh is open, the token is on, secrets are elsewhere, images do not
change by themselves, nodes end when they are idle.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.resources import Node, check_slots
from lrmc_ray.config import ResourceSettings
from lrmc_ray.errors import ConfigError, IncompleteArtifactError

PLACEHOLDER = "CHANGE"
"""Marks what only the user can fill in."""
TRIAL_SLOT = "lrmc_trial"
LONGEST_IDLE_MINUTES = 60
SSH_PORT = 22
_SECRETS = (
    (r"\bAKIA[0-9A-Z]{16}\b", "an AWS access key"),
    (r"-----BEGIN [A-Z ]*PRIVATE KEY", "a private key"),
    (r"\bhf_[A-Za-z0-9]{20,}", "a Hugging Face token"),
    (r"\bgh[pousr]_[A-Za-z0-9]{30,}", "a GitHub token"),
    (r"://[^/\s:@$]+:[^/\s@$]+@", "a password in an address"),
    (
        r"(?i)(?<![a-z])(?:password|passwd|secret|token|api_?key)\w*\s*[=:]\s*['\"]?[A-Za-z0-9+/_-]{8,}",
        "a secret",
    ),
)
_NO_SECRET = re.compile(r"(?i)auth_?mode=token|auth_token")
_CLOSED_PORTS = (
    "RAY_enable_metrics_collection=0",
    "AUTOSCALER_METRIC_PORT=-1",
    "DASHBOARD_METRIC_PORT=-1",
)
"""What Ray's metrics are switched off by: they would answer whoever asks, without the token."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def load_cluster(path: Path) -> dict[str, Any]:
    """The content of a cluster file.

    Raises:
        IncompleteArtifactError: there is no such file.
        ConfigError: it is not YAML, no mapping, or a manifest for Kubernetes.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteArtifactError(f"{path} does not exist; give a cluster file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if isinstance(config, dict) and "apiVersion" in config:
        raise ConfigError(
            f"{path} must be a file for `ray up`, got a manifest for Kubernetes; check it with "
            f"`kubectl apply --dry-run=server -f {path}`"
        )
    if not isinstance(config, dict) or not isinstance(config.get("provider"), dict):
        raise ConfigError(f"{path} must have a section `provider`; see cluster.yaml")
    return config


def placeholders(config: Mapping[str, Any]) -> list[str]:
    """What is still to be filled in, by where it stands."""
    return [f"{where} is {text!r}" for where, text in _strings(config) if PLACEHOLDER in text]


def problems(config: Mapping[str, Any]) -> list[str]:
    """Every broken rule: what is wrong, and what to write instead."""
    return [
        *_limits(config),
        *_open_ports(config),
        *_secrets(config),
        *_images(config),
        *_machines(config),
        *_roles(config),
    ]


def cluster_slots(config: Mapping[str, Any], resources: ResourceSettings) -> int:
    """Workers that fit side by side once every node is there.

    Raises:
        ConfigError: the file does not say what its nodes have.
        ResourceError: not one fits.
    """
    kinds = config.get("available_node_types")
    if not kinds:
        raise ConfigError(
            f"the nodes of provider {config['provider'].get('type')} do not say what they have; "
            "see `ray status` on the head, and give --slots N, the workers that fit there"
        )
    nodes = [
        Node(kind.get("resources", {}), kind.get("labels", {}), kind.get("max_workers", 0))
        for name, kind in kinds.items()
        if name != config.get("head_node_type")
    ]
    slots = check_slots(nodes, resources, 1, "worker")
    largest = max(1, int(slots / max(1, sum(node.count for node in nodes))))
    return min(slots, largest * int(config.get("max_workers", 2)))


def _limits(config: Mapping[str, Any]) -> Iterator[str]:
    idle = config.get("idle_timeout_minutes")
    if not isinstance(idle, int | float) or not 0 < idle <= LONGEST_IDLE_MINUTES:
        yield (
            f"idle_timeout_minutes must be in (0, {LONGEST_IDLE_MINUTES}], got {idle}: idle nodes "
            "cost money; set it to 10"
        )
    if config["provider"].get("type") == "local":
        return
    most = config.get("max_workers")
    if not isinstance(most, int) or most < 1:
        yield f"max_workers must be set, got {most}: it bounds what the cluster can cost"
    for name, kind in _kinds(config):
        if name == config.get("head_node_type"):
            continue
        low, high = kind.get("min_workers", 0), kind.get("max_workers")
        if not isinstance(high, int) or not 0 <= low <= high:
            yield f"{name}: 0 <= min_workers <= max_workers must hold, got {low} and {high}"


def _open_ports(config: Mapping[str, Any]) -> Iterator[str]:
    for where, text in _strings(config):
        if re.search(r"(?:--(?:[a-z-]*host|bind|listen)[= ])\s*(?:0\.0\.0\.0|::|\*)", text):
            yield f"{where} listens for the world; write 127.0.0.1 and use ssh's port forwarding"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(key) or [] if "ray start" in command]
        if not starts:
            yield f"{key} must be given: Ray's own open the dashboard for the world"
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command:
                yield f"{key} must start with RAY_AUTH_MODE=token: whoever reaches a port runs code"
            environment = command.partition("ray start")[0].split()
            if lacking := [setting for setting in _CLOSED_PORTS if setting not in environment]:
                yield (
                    f"{key} must have {' '.join(lacking)} before `ray start`: whoever reaches "
                    "these ports needs no token"
                )
            if "--head" not in command:
                continue
            host = re.search(r"--dashboard-host[= ]\s*(\S+)", command)
            if "--include-dashboard=false" not in command and (
                host is None or host[1] not in _LOOPBACK
            ):
                yield f"{key} must have --dashboard-host=127.0.0.1"
    for command in _commands(config):
        if "mlflow server" in command or "mlflow ui" in command:
            host = re.search(r"--host[= ]\s*(\S+)", command)
            if host is None or host[1] not in _LOOPBACK:
                yield "MLflow has no password: its server must have --host 127.0.0.1"
            if "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" not in command:
                yield "MLFLOW_SERVER_ENABLE_JOB_EXECUTION must be false: its jobs run code unasked"
    permissions = config["provider"].get("security_group", {}).get("IpPermissions", [])
    for rule in permissions:
        ranges = [r.get("CidrIp") for r in rule.get("IpRanges", [])]
        ranges += [r.get("CidrIpv6") for r in rule.get("Ipv6Ranges", [])]
        is_ssh = rule.get("FromPort") == rule.get("ToPort") == SSH_PORT
        if not is_ssh and {"0.0.0.0/0", "::/0"} & set(ranges):
            yield (
                f"provider.security_group opens ports {rule.get('FromPort')} to "
                f"{rule.get('ToPort')} for the world; only {SSH_PORT} may be"
            )
    mounts = config.get("file_mounts") or {}
    if not any(str(target).endswith(".ray/auth_token") for target in mounts):
        yield 'file_mounts must bring the token: ~/.ray/auth_token: "~/.ray/auth_token"'


def _secrets(config: Mapping[str, Any]) -> Iterator[str]:
    for where, text in _strings(config):
        for pattern, what in _SECRETS:
            if re.search(pattern, _NO_SECRET.sub("", text)):
                yield f"{where} holds {what}; keep it in a file of its own, readable by you alone"
                break
    key = str(config.get("auth", {}).get("ssh_private_key", "~/.ssh/x"))
    if not key.startswith(("~", "/")):
        yield f"auth.ssh_private_key must lie outside of the checkout, got {key}; move it to ~/.ssh"


def _images(config: Mapping[str, Any]) -> Iterator[str]:
    kind_of_provider = config["provider"].get("type")
    for name, kind in _kinds(config):
        node = kind.get("node_config", {})
        if kind_of_provider == "aws":
            image = str(node.get("ImageId", ""))
            if not re.fullmatch(rf"ami-(?:[0-9a-f]{{8,17}}|{PLACEHOLDER})", image):
                yield f"{name}: ImageId must be one image, ami-..., got {image or None!r}"
        if kind_of_provider == "gcp":
            for disk in node.get("disks", []):
                image = str(disk.get("initializeParams", {}).get("sourceImage", ""))
                if "/images/" not in image or "/images/family/" in image:
                    yield f"{name}: sourceImage must be one image, not a family, got {image!r}"
    docker = config.get("docker") or {}
    for key in ("image", "head_image", "worker_image"):
        image = str(docker.get(key) or "")
        if image and "@sha256:" not in image:
            yield f"docker.{key} must be pinned by its digest, NAME@sha256:..., got {image!r}"


def _machines(config: Mapping[str, Any]) -> Iterator[str]:
    if config["provider"].get("type") != "aws":
        return
    for name, kind in _kinds(config):
        node = kind.get("node_config", {})
        if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield f"{name}: MetadataOptions must be {{HttpTokens: required}} (IMDSv2)"
        for disk in node.get("BlockDeviceMappings", []):
            if disk.get("Ebs", {}).get("Encrypted") is not True:
                yield f"{name}: its disk must have Encrypted: true"


def _roles(config: Mapping[str, Any]) -> Iterator[str]:
    """The head waits for workers; its cores are not lent to them."""
    if config["provider"].get("type") == "local":
        text = " ".join(config.get("head_start_ray_commands") or [])
        if "--num-cpus=0" not in text or TRIAL_SLOT not in text:
            yield (
                f"the head must start with --num-cpus=0 --resources='{{\"{TRIAL_SLOT}\": 64}}': "
                "the drivers of trials wait there"
            )
        return
    head = (config.get("available_node_types") or {}).get(config.get("head_node_type"), {})
    resources = head.get("resources", {})
    if resources.get("CPU") != 0 or not resources.get(TRIAL_SLOT):
        yield (
            f"the head's resources must be {{CPU: 0, {TRIAL_SLOT}: 64}}: the drivers of trials "
            f"wait there; got {resources}"
        )


def _kinds(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list((config.get("available_node_types") or {}).items())


def _commands(config: Mapping[str, Any]) -> list[str]:
    return [
        str(command)
        for key, value in config.items()
        if key.endswith("_commands")
        for command in value or []
    ]


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the file, with its place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{where}[{index}]")
