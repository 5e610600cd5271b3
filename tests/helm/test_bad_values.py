"""Values that cannot work are refused before anything is installed, with a line that says what to change."""

from __future__ import annotations

import pytest

from .chart import DIGESTS, VERSIONS, template

CPU = ["values-cpu.yaml"]
# (--set, what the message must say); in values-cpu.yaml's place where it is named.
BY_SCHEMA = [
    ("bogus=1", "bogus"),
    ("gateway.replica=2", "replica"),
    ("gateway.replicas=0", "minimum"),
    ("gateway.replicas=two", "/gateway/replicas"),
    ("gateway.settings.max_request=5", "max_request"),
    ("gateway.settings.max_requests=many", "/gateway/settings/max_requests"),
    ("gateway.settings.grpc_address=1.2.3.4:5", "grpc_address"),
    ("gateway.settings.log_level=loud", "/gateway/settings/log_level"),
    ("gateway.settings.failover_s=30 parsecs", "/gateway/settings/failover_s"),
    ("gateway.drain.seconds=-1", "/gateway/drain/seconds"),
    ("gateway.service.type=Ingress", "/gateway/service/type"),
    ("gateway.pdb.maxUnavailable=half", "/gateway/pdb/maxUnavailable"),
    ("gateway.autoscaling.cpuPercent=101", "/gateway/autoscaling/cpuPercent"),
    ("engine.kind=DaemonSet", "/engine/kind"),
    ("engine.workers=0", "/engine/workers"),
    ("engine.worker.gpus=17", "/engine/worker/gpus"),
    ("engine.rollout.type=Recreate", "/engine/rollout/type"),
    ("images.registry=https://ghcr.io", "/images/registry"),
    ("networkPolicy.mesh=linkerd", "/networkPolicy/mesh"),
    ("tenants.named.acme.weight=0", "/tenants/named/acme/weight"),
    ("tenants.named.acme.max_requests=2", "max_requests"),
    ("monitoring.alerts.limits.bogus=1", "bogus"),
    ("gateway.settings.batch_dir=/data", "batch_dir"),
    ("engine.worker.settings.device=tpu", "/engine/worker/settings/device"),
    ("engine.worker.settings.kv_cache_memory=lots", "/engine/worker/settings/kv_cache_memory"),
    ("engine.worker.settings.rank=1", "rank"),
    ("engine.scheduler.settings.max_num_seqs=1.5", "/engine/scheduler/settings/max_num_seqs"),
    ("engine.worker.resources.limits.memory=4 GB", "/engine/worker/resources/limits/memory"),
    ("engine.worker.resources.limit.memory=4Gi", "limit"),
    ("engine.shm.sizeLimit=big", "/engine/shm/sizeLimit"),
    ("images.worker.digest=sha256:1234", "/images/worker/digest"),
    ("images.worker.repository=UPPER", "/images/worker/repository"),
    ("images.pullPolicy=Sometimes", "/images/pullPolicy"),
    ("model.source=hub", "/model/source"),
    ("model.mountPath=models", "/model/mountPath"),
    ("model.file=model.bin", "/model/file"),
    ("model.folder=../etc", "/model/folder"),
    ("model.fetch.source=../etc", "/model/fetch/source"),
    ("model.fetch.source=https://hub.test/org/name", "/model/fetch/source"),
    ("securityContext.runAsUser=0", "/securityContext/runAsUser"),
    ("listenAddress=127.0.0.1", "/listenAddress"),
    ("fullnameOverride=Octavo", "/fullnameOverride"),
    ("monitoring.interval=often", "/monitoring/interval"),
    ("test.tokens=0", "/test/tokens"),
]
BY_RULE = [
    ("model.name=", "model.name is needed"),
    ("model.name=mine,model.claim.name=mine", "model.fetch.source=demo is smollm2-135m-instruct, not mine"),
    ("model.claim.create=false", "model.claim.name is needed"),
    ("model.verify=false", "model.fetch needs model.verify"),
    ("model.file=other.gguf", "model.file must be model.gguf"),
    ("model.source=builtin", "model.fetch fills a claim"),
    ("images.allowTags=false", "digest is needed"),
    ("gateway.drain.seconds=300", "gateway.drain.terminationGracePeriodSeconds must be at least 315"),
    ("engine.drain.terminationGracePeriodSeconds=69", "engine.drain.terminationGracePeriodSeconds must be at least 70"),
    ("engine.kind=LeaderWorkerSet", "needs transport.curve.enabled=true"),
    ("transport.curve.enabled=true", "transport.curve is for engine.kind=LeaderWorkerSet"),
    ("engine.tensorParallel=2", "not for engine.worker.settings.device=cpu"),
    ("engine.worker.gpus=2", "engine.tensorParallel must be 2"),
    ("engine.worker.gpus=1,engine.tensorParallel=2", "engine.worker.gpus must be 2"),
    ("engine.worker.settings.device=cuda", "needs engine.worker.gpus"),
    ("engine.worker.gpus=1,engine.worker.settings.device=auto", "octavo-worker-cpu has no CUDA"),
    ("monitoring.enabled=true", "networkPolicy.monitoring is needed"),
    ('networkPolicy.admins=[{"podSelector":{}}]', "networkPolicy.admins needs admin.keysSecret"),
    ("gateway.batch.claim=files,gateway.http=false", "gateway.batch is of the HTTP API"),
    ("gateway.rollout.maxSurge=0", "must not both be 0"),
    ("certManager.publicIssuerRef.name=acme", "publicIssuerRef needs tls.dnsNames"),
    ("gateway.podSpec.volumes[0].name=x", "podSpec.volumes is set by the chart itself"),
    ("engine.worker.gpus=1", "uses no GPU"),
    ("engine.worker.hungSeconds=60", "engine.worker.hungSeconds must be more than"),
    ("transport.tls.enabled=true", "transport.tls.existingSecret is needed"),
    ("tls.enabled=true", "tls.existingSecret is needed"),
    ("tls.clientCertificates=true", "tls.clientCertificates needs tls.enabled"),
    ("gateway.settings.certificate_tenants=true", "needs tls.clientCertificates"),
    ("certManager.enabled=true", "certManager.issuerRef.name is needed"),
    ("gateway.auth.jwksConfigMap=keys", "jwt_issuer and jwt_audience"),
    ("gateway.settings.jwt_issuer=i,gateway.settings.jwt_audience=a", "gateway.auth.jwksConfigMap goes with"),
    ("engine.autoscaling.enabled=true", "engine.autoscaling.prometheusAddress is needed"),
    ("gateway.autoscaling.enabled=true,gateway.autoscaling.minReplicas=11", "minReplicas must not be more"),
    ("engine.worker.settings.otlp_endpoint=http://otel:4317", "networkPolicy.collectors is needed"),
    ("route.enabled=true", "route.parentRefs is needed"),
]


@pytest.mark.parametrize(("values", "said"), BY_SCHEMA)
def test_the_schema_refuses(values: str, said: str) -> None:
    done = template(CPU, [values], VERSIONS[-1])
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(("values", "said"), BY_RULE)
def test_a_rule_refuses(values: str, said: str) -> None:
    done = template(CPU, [values], VERSIONS[-1])
    assert done.returncode != 0
    assert "schema" not in done.stderr, done.stderr
    assert said in done.stderr


def test_a_volume_of_an_image_is_refused_where_kubernetes_has_none() -> None:
    values = ["model.fetch.enabled=false", "model.source=image", "model.image.repository=registry.test/model"]
    assert template(CPU, values, "1.33").returncode == 0
    done = template(CPU, values, "1.32")
    assert "model.source=image needs Kubernetes 1.33" in done.stderr


def test_several_engines_at_once_are_refused_where_a_stateful_set_would_ignore_them() -> None:
    values = ["engine.rollout.maxUnavailable=25%"]
    assert template(CPU, values, "1.35").returncode == 0
    assert "needs Kubernetes 1.35" in template(CPU, values, "1.34").stderr


def test_engines_over_nodes_refuse_what_only_one_pod_has() -> None:
    multi_node = ["values-multi-node.yaml"]
    named = ["model.name=m", "model.claim.name=c"]
    assert template(multi_node, named, VERSIONS[-1]).returncode == 0
    for values, said in (
        ("engine.cache.kind=claim", "use emptyDir"),
        ("engine.tensorParallel=4", "must be engine.nodes"),
        ("engine.worker.gpus=2", "engine.worker.gpus must be 1"),
        ("engine.rollout.type=OnDelete", "use engine.rollout.partition"),
        ("transport.curve.existingSecret=", "transport.curve.existingSecret is needed"),
    ):
        assert said in template(multi_node, [*named, values], VERSIONS[-1]).stderr


@pytest.mark.parametrize("file", ["values-gpu.yaml", "values-gpu-tensor-parallel.yaml", "values-multi-node.yaml"])
def test_values_for_gpus_ask_for_the_model(file: str) -> None:
    assert "model.name is needed" in template([file], [], VERSIONS[-1]).stderr
    assert "model.claim.name is needed" in template([file], ["model.name=mine"], VERSIONS[-1]).stderr


@pytest.mark.parametrize("image", ["gateway", "scheduler", "worker"])
def test_values_for_production_ask_for_every_digest(image: str) -> None:
    done = template(["values-production.yaml"], [each for each in DIGESTS if f".{image}." not in each], VERSIONS[-1])
    assert f"images.{image}.digest is needed" in done.stderr
    assert template(["values-production.yaml"], DIGESTS, VERSIONS[-1]).returncode == 0


def test_a_cluster_that_is_too_old_is_refused() -> None:
    done = template(CPU, [], "1.28")
    assert "chart requires kubeVersion" in done.stderr
