"""What KubeRay's and Kubernetes' schemas say of the fields that ``clusters/kuberay.yaml`` has.

Written after KubeRay's ``ray.io_rayclusters.yaml`` (controller-gen 0.16.5; Copyright The KubeRay
Authors, Apache License 2.0): names, types, bounds and what is required. Of a pod's template, which
that file takes over from Kubernetes, the fields that are used here. A field that is not among
these is an error, as ``kubectl apply`` with strict validation has it.
"""

from typing import Any

_TEXT = {"type": "string"}
_YES_OR_NO = {"type": "boolean"}
_WHOLE = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_QUANTITY = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
}


def _fields(required: list[str] | None = None, /, **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": required or [],
        "additionalProperties": False,
    }


def _many(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


_QUANTITIES = {"type": "object", "additionalProperties": _QUANTITY}
_RESOURCES = _fields(limits=_QUANTITIES, requests=_QUANTITIES)
_ENV = _many(_fields(["name"], name=_TEXT, value=_TEXT))
_MOUNTS = _many(
    _fields(["mountPath", "name"], mountPath=_TEXT, name=_TEXT, readOnly=_YES_OR_NO, subPath=_TEXT)
)
_CONTAINER = _fields(
    ["name"],
    name=_TEXT,
    image=_TEXT,
    env=_ENV,
    resources=_RESOURCES,
    volumeMounts=_MOUNTS,
    securityContext=_fields(
        allowPrivilegeEscalation=_YES_OR_NO,
        capabilities=_fields(add=_many(_TEXT), drop=_many(_TEXT)),
        readOnlyRootFilesystem=_YES_OR_NO,
        runAsNonRoot=_YES_OR_NO,
    ),
)
_POD = _fields(
    ["containers"],
    containers=_many(_CONTAINER),
    nodeSelector=_TEXTS,
    securityContext=_fields(
        runAsNonRoot=_YES_OR_NO, runAsUser=_WHOLE, runAsGroup=_WHOLE, fsGroup=_WHOLE
    ),
    terminationGracePeriodSeconds=_WHOLE,
    tolerations=_many(_fields(key=_TEXT, operator=_TEXT, value=_TEXT, effect=_TEXT)),
    volumes=_many(
        _fields(
            ["name"],
            name=_TEXT,
            persistentVolumeClaim=_fields(["claimName"], claimName=_TEXT, readOnly=_YES_OR_NO),
            emptyDir=_fields(medium=_TEXT, sizeLimit=_QUANTITY),
        )
    ),
)
_TEMPLATE = _fields(metadata=_fields(annotations=_TEXTS, labels=_TEXTS), spec=_POD)
_OF_GROUP = {"rayStartParams": _TEXTS, "resources": _TEXTS, "labels": _TEXTS, "template": _TEMPLATE}
_METADATA = _fields(["name"], name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS)

RAY_CLUSTER = _fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=_METADATA,
    spec=_fields(
        ["headGroupSpec"],
        rayVersion=_TEXT,
        authOptions=_fields(enableK8sTokenAuth=_YES_OR_NO, mode={"enum": ["disabled", "token"]}),
        enableInTreeAutoscaling=_YES_OR_NO,
        autoscalerOptions=_fields(
            env=_ENV,
            idleTimeoutSeconds=_WHOLE,
            image=_TEXT,
            imagePullPolicy=_TEXT,
            resources=_RESOURCES,
            upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            version={"enum": ["v1", "v2"]},
            volumeMounts=_MOUNTS,
        ),
        headServiceAnnotations=_TEXTS,
        suspend=_YES_OR_NO,
        headGroupSpec=_fields(
            ["template"], enableIngress=_YES_OR_NO, serviceType=_TEXT, **_OF_GROUP
        ),
        workerGroupSpecs=_many(
            _fields(
                ["groupName", "maxReplicas", "minReplicas", "template"],
                groupName=_TEXT,
                replicas=_WHOLE,
                minReplicas=_WHOLE,
                maxReplicas=_WHOLE,
                idleTimeoutSeconds=_WHOLE,
                numOfHosts=_WHOLE,
                suspend=_YES_OR_NO,
                **_OF_GROUP,
            )
        ),
    ),
)
"""``ray.io/v1``, strict."""

_SELECTOR = _fields(matchLabels=_TEXTS)
NETWORK_POLICY = _fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "networking.k8s.io/v1"},
    kind={"const": "NetworkPolicy"},
    metadata=_METADATA,
    spec=_fields(
        ["podSelector"],
        podSelector=_SELECTOR,
        policyTypes=_many({"enum": ["Ingress", "Egress"]}),
        ingress=_many(_fields(**{"from": _many(_fields(podSelector=_SELECTOR))})),
    ),
)
"""``networking.k8s.io/v1``, the fields that are used."""
