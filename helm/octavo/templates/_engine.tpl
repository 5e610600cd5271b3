{{/* A pod of an engine; the context is (dict "root" $ "hasScheduler" bool). */}}
{{- define "octavo.enginePod" -}}
{{- $root := .root -}}
{{- $engine := $root.Values.engine -}}
{{ include "octavo.podBase" $root }}
{{- include "octavo.podSpec" $engine.podSpec }}
terminationGracePeriodSeconds: {{ int $engine.drain.terminationGracePeriodSeconds }}
{{- with $engine.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- include "octavo.placement" (list $root $engine "engine") }}
{{- with printf "%s%s" (include "octavo.verifyModel" (list $root (without (list (include "octavo.modelFile" $root)) ""))) (include "octavo.more" $engine.extraInitContainers) | trim }}
initContainers:
  {{- . | nindent 2 }}
{{- end }}
containers:
  {{- if .hasScheduler }}
  {{- include "octavo.scheduler" $root | trim | nindent 2 }}
  {{- end }}
  {{- range $number := until (int $engine.workers) }}
  {{- include "octavo.worker" (dict "root" $root "number" $number "hasScheduler" $.hasScheduler) | trim | nindent 2 }}
  {{- end }}
  {{- include "octavo.more" $engine.extraContainers | nindent 2 }}
volumes:
  {{- include "octavo.modelVolume" $root | trim | nindent 2 }}
  {{- if .hasScheduler }}
  {{- include "octavo.hopVolume" (list $root "engine") | nindent 2 }}
  {{- include "octavo.adminVolume" $root | nindent 2 }}
  - name: tenants
    configMap:
      name: {{ include "octavo.fullname" $root }}-tenants
  {{- end }}
  {{- if $root.Values.transport.curve.enabled }}
  - name: curve
    secret:
      secretName: {{ $root.Values.transport.curve.existingSecret }}
      defaultMode: 0440
  {{- end }}
  - name: ipc
    emptyDir:
      medium: Memory
      sizeLimit: {{ $engine.ipc.sizeLimit }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ $engine.shm.sizeLimit }}
  {{- if eq $engine.cache.kind "emptyDir" }}
  - name: cache
    emptyDir:
      sizeLimit: {{ $engine.cache.size }}
  {{- end }}
  {{- include "octavo.tmpVolume" $root | nindent 2 }}
  {{- include "octavo.more" $engine.extraVolumes | nindent 2 }}
{{- end }}

{{- define "octavo.scheduler" -}}
{{- $engine := .Values.engine -}}
- name: scheduler
  image: {{ include "octavo.image" (list . "scheduler") }}
  imagePullPolicy: {{ .Values.images.pullPolicy }}
  command: [octavo]
  args:
    - scheduler
    - --scheduler-id=$(POD_NAME)
    - --scheduler-address={{ .Values.listenAddress }}:50052
    {{- if not .Values.transport.tls.enabled }}
    - --trusted-network  # a NetworkPolicy lets only gateways in
    {{- end }}
    {{- if .Values.transport.curve.enabled }}
    - --worker-endpoint=tcp://{{ .Values.listenAddress }}:50053
    - --worker-curve-key=/etc/octavo/curve/scheduler.key
    - --worker-curve-allowed=/etc/octavo/curve/allowed
    {{- else }}
    - --worker-endpoint=ipc:///run/octavo/workers
    {{- end }}
    - --health-address={{ .Values.listenAddress }}:50055
    - --grace-s={{ int $engine.drain.seconds }}s
    - --tenants-file=/etc/octavo/tenants/tenants.yaml
    {{- include "octavo.adminFlags" . | trim | nindent 4 }}
    {{- include "octavo.metricsFlag" (list . 9090) | trim | nindent 4 }}
    {{- include "octavo.hopFlags" . | trim | nindent 4 }}
    {{- include "octavo.flags" $engine.scheduler.settings | trim | nindent 4 }}
  {{- include "octavo.containerEnvironment" (list . $engine.scheduler) | nindent 2 }}
  ports:
    - name: grpc-scheduler
      containerPort: 50052
    - name: grpc-health
      containerPort: 50055
    {{- if .Values.transport.curve.enabled }}
    - name: zmq-workers
      containerPort: 50053
    {{- end }}
    {{- include "octavo.adminPort" . | nindent 4 }}
    {{- include "octavo.metricsPort" (list . 9090 "metrics") | nindent 4 }}
  {{- include "octavo.probes" . | nindent 2 }}
  {{- include "octavo.preStop" (list . $engine.drain.preStopSeconds) | nindent 2 }}
  securityContext:
    {{- include "octavo.containerSecurity" . | nindent 4 }}
  resources:
    {{- toYaml $engine.scheduler.resources | nindent 4 }}
  volumeMounts:
    - name: ipc
      mountPath: /run/octavo
    - name: tmp
      mountPath: /tmp
    {{- if .Values.transport.curve.enabled }}
    - name: curve
      mountPath: /etc/octavo/curve
      readOnly: true
    {{- end }}
    {{- include "octavo.hopMount" . | nindent 4 }}
    {{- include "octavo.adminMount" . | nindent 4 }}
    - name: tenants
      mountPath: /etc/octavo/tenants
      readOnly: true
    {{- include "octavo.more" $engine.scheduler.extraVolumeMounts | nindent 4 }}
{{- end }}

{{/* Worker container `number` of a pod. All containers of a pod are told to stop at once, so a worker goes on until its scheduler is gone. */}}
{{- define "octavo.worker" -}}
{{- $root := .root -}}
{{- $engine := $root.Values.engine -}}
{{- $worker := $engine.worker -}}
{{- $ranks := int $engine.tensorParallel -}}
{{- $overNodes := eq $engine.kind "LeaderWorkerSet" -}}
{{- $probe := list "octavo" "health" (printf "--alive-file=/run/octavo/alive-%d" .number) (printf "--max-age-s=%ds" (int $worker.hungSeconds)) -}}
- name: worker-{{ .number }}
  image: {{ include "octavo.image" (list $root "worker") }}
  imagePullPolicy: {{ $root.Values.images.pullPolicy }}
  command: [octavo]
  args:
    - worker
    - --model={{ include "octavo.modelPath" $root }}
    - --worker-id=$(POD_NAME)-{{ .number }}
    {{- if and $overNodes .hasScheduler }}
    - --worker-endpoint=tcp://$(POD_IP):50053
    {{- else if $overNodes }}
    - --worker-endpoint=tcp://$(LWS_LEADER_ADDRESS):50053
    {{- else }}
    - --worker-endpoint=ipc:///run/octavo/workers
    {{- end }}
    {{- if $root.Values.transport.curve.enabled }}
    - --curve-key=/etc/octavo/curve/worker.key
    - --curve-server-key=/etc/octavo/curve/scheduler.pub
    {{- end }}
    {{- if gt $ranks 1 }}
    - --world-size={{ $ranks }}
    {{- if $overNodes }}
    - --local-ranks={{ div $ranks (int $engine.nodes) }}
    - --node-rank=$(NODE_NUMBER)
    - --rendezvous=tcp://{{ ternary "$(POD_IP)" "$(LWS_LEADER_ADDRESS)" .hasScheduler }}:29500
    {{- else }}
    # All ranks are processes of this container: NCCL uses NVLink only between GPUs that a process sees.
    - --local-ranks={{ $ranks }}
    - --rendezvous=ipc:///run/octavo/ranks-{{ .number }}
    {{- end }}
    {{- end }}
    - --alive-file=/run/octavo/alive-{{ .number }}
    - --drain-s={{ sub (int $engine.drain.terminationGracePeriodSeconds) 5 }}s
    - --packed-cache-dir=/var/cache/octavo/packed
    {{- if not $worker.settings.packed_cache_limit }}
    # Compiled kernels are there as well.
    - --packed-cache-limit={{ include "octavo.share" (list $engine.cache.size 0.8) }}
    {{- end }}
    {{- include "octavo.metricsFlag" (list $root (add 9100 .number)) | trim | nindent 4 }}
    {{- include "octavo.flags" $worker.settings | trim | nindent 4 }}
  env:
    {{- include "octavo.environment" $root | nindent 4 }}
    - name: XDG_CACHE_HOME
      value: /var/cache/octavo
    - name: TRITON_CACHE_DIR
      value: /var/cache/octavo/triton
    {{- if dig "limits" "cpu" "" $worker.resources }}
    - name: OCTAVO_NUM_THREADS
      valueFrom:
        resourceFieldRef: {containerName: worker-{{ .number }}, resource: limits.cpu}
    {{- end }}
    {{- if $overNodes }}
    - name: POD_IP
      valueFrom:
        fieldRef: {fieldPath: status.podIP}
    - name: NODE_NUMBER
      valueFrom:
        fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"}
    {{- end }}
    {{- include "octavo.more" $worker.extraEnv | nindent 4 }}
  {{- with $worker.extraEnvFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "octavo.metricsPort" (list $root (add 9100 .number) (printf "metrics-%d" .number)) | trim }}
  ports:
    {{- . | nindent 4 }}
  {{- end }}
  startupProbe:
    exec:
      command: {{ toJson $probe }}
    initialDelaySeconds: 10
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: {{ div (int $worker.startupSeconds) 5 }}
  livenessProbe:
    exec:
      command: {{ toJson $probe }}
    periodSeconds: 15
    timeoutSeconds: 10
    failureThreshold: 2
  securityContext:
    {{- include "octavo.containerSecurity" $root | nindent 4 }}
  resources:
    {{- $resources := deepCopy $worker.resources }}
    {{- if $worker.gpus }}
    {{- $gpus := dict $worker.gpuResource (int $worker.gpus) }}
    {{- $resources = mergeOverwrite $resources (dict "limits" $gpus "requests" $gpus) }}
    {{- end }}
    {{- toYaml $resources | nindent 4 }}
  volumeMounts:
    - name: ipc
      mountPath: /run/octavo
    - name: shm
      mountPath: /dev/shm
    - name: cache
      mountPath: /var/cache/octavo
    - name: tmp
      mountPath: /tmp
    {{- if $root.Values.transport.curve.enabled }}
    - name: curve
      mountPath: /etc/octavo/curve
      readOnly: true
    {{- end }}
    {{- include "octavo.modelMount" $root | trim | nindent 4 }}
    {{- include "octavo.more" $worker.extraVolumeMounts | nindent 4 }}
{{- end }}

{{/* A part of a quantity, as a size of the processes' settings; the context is (list "10Gi" 0.8). */}}
{{- define "octavo.share" -}}
{{- $number := regexFind "^[0-9.]+" (index . 0) -}}
{{- printf "%g%sB" (mulf (float64 $number) (index . 1)) (trimPrefix $number (index . 0)) -}}
{{- end }}
