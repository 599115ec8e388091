"""A run as a Kubernetes JobSet: one Job of indexed pods, restarted as a whole, with the settings that Slurm takes too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcat_nemo.common.redact import refuse_secrets, what_secret
from kvcat_nemo.launch.job_settings import Settings
from kvcat_nemo.launch.values import forms, has_control_characters
from kvcat_nemo.runs import exit_codes

SCRIPTS = "/opt/kvcat/launch"
"""Where the project's image has the launch scripts."""
USER = 10001
"""The image's user."""
DEFAULT_PORT = 29500


def jobset(settings: Settings, *, scripts: str = SCRIPTS, max_restarts: int = 10) -> dict[str, Any]:
    """The manifest of a run.

    Args:
        settings: mounts name their source: an absolute path is the host's, another word a PersistentVolumeClaim.
        scripts: folder of the launch scripts in the image.
        max_restarts: restarts after failures. Those after preemption are not counted; the limit on restarts without a new
            checkpoint (settings.max_stalled) holds for both.

    Raises:
        ValueError: when the settings do not make a valid JobSet.
    """
    name = settings.name
    if not forms()["k8s-name"].pattern.fullmatch(name):
        raise ValueError(
            f"name={name!r}: Kubernetes wants lower-case letters, digits and dashes, at most 52, a letter first"
        )
    if not settings.image:
        raise ValueError("image=None: Kubernetes runs containers only; give one built from the Dockerfile")
    mounts, volumes = _volumes(settings)
    limits = {"nvidia.com/gpu": str(settings.gpus_per_node)} if settings.gpus_per_node else {}
    container = {
        "name": "ranks",
        "image": settings.image,
        "command": [f"{scripts}/torchrun.sh", "--", *map(_literal, settings.command)],
        "env": _environment(settings),
        "ports": [{"containerPort": settings.master_port or DEFAULT_PORT, "name": "rendezvous"}],
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    if limits:
        container["resources"] = {"limits": limits, "requests": dict(limits)}
    pod = {
        "restartPolicy": "Never",  # a rank alone cannot come back: the JobSet restarts all
        "terminationGracePeriodSeconds": settings.signal_seconds,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        "containers": [container],
        "volumes": volumes,
    }
    job = {
        "completionMode": "Indexed",
        "completions": settings.nodes,
        "parallelism": settings.nodes,
        "backoffLimit": 0,
        # A pod that saved and stopped, or that was evicted, fails the job for a reason that the JobSet does not count.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "ranks",
                        "operator": "In",
                        "values": [exit_codes.REQUEUE],
                    },
                },
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": {
                "maxRestarts": max_restarts,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _environment(settings: Settings) -> list[dict[str, Any]]:
    name = settings.name
    values = {
        "KVCAT_RUN_DIR": str(settings.run_dir),
        "KVCAT_NODES": str(settings.nodes),
        "KVCAT_PROCS_PER_NODE": str(settings.procs_per_node),
        "KVCAT_MASTER_ADDR": f"{name}-node-0-0.{name}",  # the name that JobSet gives pod 0
        "KVCAT_MASTER_PORT": str(settings.master_port or DEFAULT_PORT),
        "KVCAT_MAX_STALLED": str(settings.max_stalled),
        "KVCAT_JOB": name,
        "KVCAT_SETUP": settings.setup,
        "KVCAT_INTERFACE": settings.interface,
    }
    out = [{"name": key, "value": _literal(value)} for key, value in values.items() if value]
    out += [
        # The same on all pods of a restart, and new with each.
        _field("KVCAT_ATTEMPT", "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"),
        _field("KVCAT_NODE_NAME", "spec.nodeName"),
    ]
    for pair in settings.env:
        key, equals, value = pair.partition("=")
        secret = {"secretKeyRef": {"name": f"{name}-env", "key": key}}
        out.append({"name": key, "value": _literal(value)} if equals else {"name": key, "valueFrom": secret})
    return out


def _literal(text: str) -> str:
    """Kubernetes fills in $(NAME) in commands and in values of variables; of two dollars it makes one."""
    return text.replace("$", "$$")


def default_name(folder: Path) -> str:
    """A job's name from that of the run's folder, in letters that Kubernetes takes."""
    return re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")


def refuse_secrets_in(manifest: Any, path: str = "") -> None:
    """Refuse credentials in a manifest, a site's additions included.

    Raises:
        ValueError: naming the field, without what it holds.
    """
    if isinstance(manifest, dict):
        name, value = manifest.get("name"), manifest.get("value")
        if isinstance(name, str) and isinstance(value, str) and what_secret(name, value):
            raise ValueError(
                f"{path}, {name}=…: that looks like a secret; put it into a Kubernetes Secret and refer to it (--env {name})"
            )
        for key, entry in manifest.items():
            refuse_secrets_in(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(manifest, list):
        for n, entry in enumerate(manifest):
            refuse_secrets_in(entry, f"{path}[{n}]")
    elif isinstance(manifest, str):
        refuse_secrets([(path, manifest)])


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _volumes(settings: Settings) -> tuple[list[dict], list[dict]]:
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    targets = []
    for n, mount in enumerate(settings.mounts):
        source, _, target = mount.partition(":")
        refuse_secrets([("mount", mount)])
        if not forms()["k8s-mount"].pattern.fullmatch(mount) or has_control_characters(mount):
            raise ValueError(f"mount={mount!r}: give CLAIM:/TARGET, or /HOST/PATH:/TARGET")
        kind = (
            {"hostPath": {"path": source}}
            if source.startswith("/")
            else {"persistentVolumeClaim": {"claimName": source}}
        )
        volumes.append({"name": f"mount{n}"} | kind)
        mounts.append({"name": f"mount{n}", "mountPath": target})
        targets.append(target.rstrip("/"))
    if not any(str(settings.run_dir).startswith(f"{target}/") for target in targets):
        raise ValueError(
            f"run_dir={settings.run_dir}: lies in no mount ({', '.join(targets) or 'there is none'}), so pods would not share it "
            "and it would go with them; give mount=CLAIM:/TARGET"
        )
    return mounts, volumes


def merge(base: Any, patch: Any) -> Any:
    """`patch` laid over `base`: dicts are merged, and so are lists whose entries have names; other values replace.

    For what a site adds to a manifest: queue labels, tolerations, node selectors.
    """
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merge(base[key], value) if key in base else value for key, value in patch.items()}
    if _named(base) and _named(patch):
        new = {entry["name"]: entry for entry in patch}
        merged = [merge(entry, new.pop(entry["name"], {})) for entry in base]
        return merged + list(new.values())
    return patch


def _named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) and "name" in entry for entry in value)


def validate(manifest: dict[str, Any]) -> None:
    """Hold a manifest against JobSet's own schema, and Kubernetes' inside it.

    Raises:
        ValueError: naming fields that do not exist (a cluster drops those silently) or have the wrong type.
        ImportError: without the package kubeflow-trainer-api (`pip install 'kvcat-nemo[k8s]'`).
    """
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
    from pydantic import ValidationError

    try:
        known = JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    except (ValidationError, AttributeError) as error:
        raise ValueError(f"not a valid JobSet: {_places(JobsetV1alpha2JobSet, manifest) or error}") from error
    unknown = list(_dropped(manifest, known))
    if unknown:
        raise ValueError(
            f"not a valid JobSet: unknown field {', '.join(unknown)} (misspelt, or in the wrong place)"
        )


def _places(model, manifest: dict[str, Any]) -> str:
    """Where values have the wrong type: pydantic's own reading knows the path, from_dict's does not."""
    from pydantic import ValidationError

    try:
        model.model_validate(manifest)
    except ValidationError as error:
        # That reading takes a quantity such as "8" for an error, which from_dict does not.
        found = [e for e in error.errors() if "ResourceQuantity" not in e["msg"]]
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found)
    return ""


def _dropped(given: Any, known: Any, path: str = "") -> Iterator[str]:
    """What the schema's models did not take over: they drop unknown fields without a word."""
    if isinstance(given, dict):
        for key, value in given.items():
            here = f"{path}.{key}" if path else key
            if not isinstance(known, dict) or key not in known:
                yield here
            else:
                yield from _dropped(value, known[key], here)
    elif isinstance(given, list):
        for n, value in enumerate(given):
            yield from _dropped(
                value, known[n] if isinstance(known, list) and n < len(known) else None, f"{path}[{n}]"
            )
