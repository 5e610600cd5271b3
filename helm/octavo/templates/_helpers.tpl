{{/* Names, labels, images and pieces that several pods have. */}}

{{- define "octavo.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- end }}

{{/* The name of what there is one of. A release may be called as another chart's objects are, or be a part of it. */}}
{{- define "octavo.ownName" -}}
{{- $fullname := include "octavo.fullname" . -}}
{{- contains "octavo" $fullname | ternary $fullname (printf "%s-octavo" $fullname) -}}
{{- end }}

{{- define "octavo.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "octavo.ownName" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{/* Labels that select pods; the context is (list $ "component"). */}}
{{- define "octavo.selector" -}}
app.kubernetes.io/name: octavo
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Labels of pods: of what a new version of the chart does not change, or it would roll every engine. The context is (list $ "component" values). */}}
{{- define "octavo.podLabels" -}}
{{ include "octavo.selector" . }}
{{- with (index . 2).podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "octavo.labels" -}}
{{- $root := index . 0 -}}
{{ include "octavo.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: octavo
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* metadata of an object; the context is (list $ "component" "name"). */}}
{{- define "octavo.metadata" -}}
name: {{ index . 2 }}
namespace: {{ (index . 0).Release.Namespace }}
labels:
  {{- include "octavo.labels" . | nindent 2 }}
{{- end }}

{{/* An image's reference; the context is (list $ "gateway"). */}}
{{- define "octavo.image" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.images.registry }}{{ . }}/{{ end -}}
{{- include "octavo.reference" (list $root (index $root.Values.images (index . 1)) (printf "images.%s" (index . 1))) -}}
{{- end }}

{{- define "octavo.reference" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}{{- $name := index . 2 -}}
{{- if not $image.repository }}{{ fail (printf "%s.repository is needed" $name) }}{{ end -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else if $root.Values.images.allowTags -}}
{{ $image.repository }}:{{ default $root.Chart.AppVersion $image.tag }}
{{- else -}}
{{ fail (printf "%s.digest is needed: a tag can be moved (images.allowTags=true accepts tags)" $name) }}
{{- end -}}
{{- end }}

{{/* Settings of a process as its flags. Numbers come as floats, and large ones must not become 1e+09. */}}
{{- define "octavo.flags" -}}
{{- range $name, $value := . }}
{{- $flag := replace "_" "-" $name }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s%s" (ternary "" "no-" $value) $flag | quote }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
- {{ printf "--%s=%s" $flag . | quote }}
{{- end }}
{{- else if and (kindIs "float64" $value) (eq (floor $value) $value) }}
- {{ printf "--%s=%d" $flag (int64 $value) | quote }}
{{- else }}
- {{ printf "--%s=%v" $flag $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Not empty where the platform chooses users: in OpenShift each namespace has a range of its own. */}}
{{- define "octavo.choosesUsers" -}}
{{- $api := .Capabilities.APIVersions.Has "security.openshift.io/v1" -}}
{{- if or (eq .Values.platform "openshift") (and $api (eq .Values.platform "auto")) }}true{{ end -}}
{{- end }}

{{- define "octavo.podSecurity" -}}
{{- $user := include "octavo.choosesUsers" . | not -}}
runAsNonRoot: true
{{- if and $user .Values.securityContext.runAsUser }}
runAsUser: {{ int64 .Values.securityContext.runAsUser }}
{{- end }}
{{- if and $user .Values.securityContext.runAsGroup }}
runAsGroup: {{ int64 .Values.securityContext.runAsGroup }}
fsGroup: {{ int64 .Values.securityContext.runAsGroup }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "octavo.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- if and .Values.securityContext.runAsUser (include "octavo.choosesUsers" . | not) }}
runAsUser: {{ int64 .Values.securityContext.runAsUser }}
{{- end }}
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* What every pod begins with. Without enableServiceLinks: false a Service could set an OCTAVO_... variable. */}}
{{- define "octavo.podBase" -}}
serviceAccountName: {{ include "octavo.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "octavo.podSecurity" . | nindent 2 }}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Affinity of pods that mount a claim which only one node can: to each other. The first goes anywhere. */}}
{{- define "octavo.oneNode" -}}
{{- if and (eq .Values.model.source "claim") .Values.model.claim.create (eq (join "," .Values.model.claim.accessModes) "ReadWriteOnce") -}}
podAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    - topologyKey: kubernetes.io/hostname
      labelSelector:
        matchLabels:
          app.kubernetes.io/name: octavo
          app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- end }}

{{/* Where pods run; the context is (list $ values-of-the-pod "component"). */}}
{{- define "octavo.placement" -}}
{{- $values := index . 1 -}}
{{- $affinity := default (include "octavo.oneNode" (index . 0) | fromYaml) $values.affinity -}}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $values.topologySpread }}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    {{- if eq (index $ 2) "gateway" }}
    # During a roll-out the pods that go do not count.
    matchLabelKeys: [pod-template-hash]
    {{- end }}
    labelSelector:
      matchLabels:
        {{- include "octavo.selector" (list (index $ 0) (index $ 2)) | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What a values' key `pod` adds to a pod's spec. What the chart itself sets stays its own. */}}
{{- define "octavo.podSpec" -}}
{{- range $key, $value := . }}
{{- if has $key (list "containers" "initContainers" "volumes" "securityContext" "serviceAccountName" "automountServiceAccountToken" "enableServiceLinks" "imagePullSecrets" "terminationGracePeriodSeconds" "restartPolicy" "priorityClassName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "runtimeClassName") }}
{{- fail (printf "podSpec.%s is set by the chart itself, by a value of its own: containers, initContainers and volumes have extraContainers, extraInitContainers and extraVolumes" $key) }}
{{- end }}
{{- end }}
{{- with . }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* preStop that waits; the context is (list $ seconds). The sleep action is there from Kubernetes 1.30 on. */}}
{{- define "octavo.preStop" -}}
{{- $seconds := int (index . 1) -}}
{{- if $seconds }}
lifecycle:
  preStop:
    {{- if semverCompare ">=1.30-0" (index . 0).Capabilities.KubeVersion.Version }}
    sleep:
      seconds: {{ $seconds }}
    {{- else }}
    exec:
      command: [sleep, {{ $seconds | quote }}]
    {{- end }}
{{- end }}
{{- end }}

{{/* Probes of a process with --health-address. The port is plain and has nothing else on it. */}}
{{- define "octavo.probes" -}}
startupProbe:
  grpc: {port: 50055, service: startup}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 90
livenessProbe:
  grpc: {port: 50055, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  grpc: {port: 50055, service: readiness}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end }}

{{- define "octavo.environment" -}}
- name: OCTAVO_LOG_FORMAT
  value: json
- name: HOME
  value: /tmp
- name: POD_NAME
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
{{- end }}

{{/* `env` and `envFrom` of a container; the context is (list $ values). What the values name wins over what the chart sets. */}}
{{- define "octavo.containerEnvironment" -}}
{{- $values := index . 1 -}}
env:
  {{- include "octavo.environment" (index . 0) | nindent 2 }}
  {{- with $values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A list of the values as items of a list of the chart, or nothing. */}}
{{- define "octavo.more" -}}
{{- with . }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The model's folder. What is fetched has a folder of its own, so another source or revision is another path: it rolls all pods. */}}
{{- define "octavo.modelFolder" -}}
{{- $folder := .Values.model.folder -}}
{{- if and .Values.model.fetch.enabled (not $folder) }}{{ $folder = replace "/" "--" .Values.model.fetch.source }}{{ end -}}
{{- .Values.model.mountPath }}{{ with $folder }}/{{ . }}{{ end -}}
{{- end }}

{{- define "octavo.modelPath" -}}
{{- include "octavo.modelFolder" . }}{{ with include "octavo.modelFile" . }}/{{ . }}{{ end -}}
{{- end }}

{{- define "octavo.modelFile" -}}
{{- default (ternary "model.gguf" "" (eq "true" (include "octavo.isDemo" .))) .Values.model.file -}}
{{- end }}

{{- define "octavo.isDemo" -}}
{{- if and .Values.model.fetch.enabled (eq .Values.model.fetch.source "demo") }}true{{ end -}}
{{- end }}

{{- define "octavo.claimName" -}}
{{- default (printf "%s-model" (include "octavo.fullname" .)) .Values.model.claim.name -}}
{{- end }}

{{- define "octavo.modelVolume" -}}
{{- if eq .Values.model.source "claim" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ include "octavo.claimName" . }}
{{- else if eq .Values.model.source "image" }}
- name: model
  image:
    reference: {{ include "octavo.reference" (list . .Values.model.image "model.image") }}
    pullPolicy: {{ .Values.images.pullPolicy }}
{{- end }}
{{- end }}

{{- define "octavo.modelMount" -}}
{{- if ne .Values.model.source "builtin" }}
- name: model
  mountPath: {{ .Values.model.mountPath }}
  readOnly: true
{{- end }}
{{- end }}

{{/* The container that verifies the model; the context is (list $ globs). It waits for a folder that is being filled. */}}
{{- define "octavo.verifyModel" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.model.verify }}
- name: verify-model
  image: {{ include "octavo.image" (list $root "scheduler") }}
  imagePullPolicy: {{ $root.Values.images.pullPolicy }}
  command: [octavo]
  args:
    - model
    - verify
    - {{ include "octavo.modelFolder" $root }}
    {{- if $root.Values.model.fetch.enabled }}
    - --source={{ $root.Values.model.fetch.source }}
    # Only a folder that a Job fills is waited for.
    - --wait-s={{ int $root.Values.model.waitSeconds }}s
    {{- end }}
    {{- if eq $root.Values.model.verifyBy "size" }}
    - --sizes-only
    {{- end }}
    {{- range index . 1 }}
    - --only={{ . }}
    {{- end }}
  securityContext:
    {{- include "octavo.containerSecurity" $root | nindent 4 }}
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {cpu: "2", memory: 256Mi}
  volumeMounts:
    {{- include "octavo.modelMount" $root | nindent 4 }}
    - name: tmp
      mountPath: /tmp
{{- end }}
{{- end }}

{{- define "octavo.tmpVolume" -}}
- name: tmp
  emptyDir:
    sizeLimit: 256Mi
{{- end }}

{{/* The flag and the port of metrics; the context is (list $ number). Processes of one pod need numbers of their own. */}}
{{- define "octavo.metricsFlag" -}}
{{- if (index . 0).Values.monitoring.enabled }}
- --metrics-address={{ (index . 0).Values.listenAddress }}:{{ index . 1 }}
{{- end }}
{{- end }}

{{- define "octavo.metricsPort" -}}
{{- if (index . 0).Values.monitoring.enabled }}
- name: {{ index . 2 }}
  containerPort: {{ index . 1 }}
{{- end }}
{{- end }}

{{/* Names under which a Service is called. */}}
{{- define "octavo.serviceNames" -}}
{{- $name := index . 1 -}}{{- $namespace := (index . 0).Release.Namespace -}}
- {{ $name }}
- {{ $name }}.{{ $namespace }}
- {{ $name }}.{{ $namespace }}.svc
- {{ $name }}.{{ $namespace }}.svc.{{ default "cluster.local" (index . 0).Values.clusterDomain }}
{{- end }}

{{/* The engines' Service as gateways dial it: with the cluster's domain, if that is known, it takes one look-up. */}}
{{- define "octavo.engineHost" -}}
{{ include "octavo.fullname" . }}-engine.{{ .Release.Namespace }}.svc{{ with .Values.clusterDomain }}.{{ . }}{{ end }}
{{- end }}

{{/* The listener for `octavo admin`, its port, and where its keys are. */}}
{{- define "octavo.adminFlags" -}}
{{- if .Values.admin.keysSecret }}
- --admin-address={{ .Values.listenAddress }}:50056
- --admin-keys=/etc/octavo/admin/api-keys.yaml
{{- end }}
{{- end }}

{{- define "octavo.adminPort" -}}
{{- if .Values.admin.keysSecret }}
- name: grpc-admin
  containerPort: 50056
{{- end }}
{{- end }}

{{- define "octavo.adminMount" -}}
{{- if .Values.admin.keysSecret }}
- name: admin-keys
  mountPath: /etc/octavo/admin
  readOnly: true
{{- end }}
{{- end }}

{{- define "octavo.adminVolume" -}}
{{- with .Values.admin.keysSecret }}
- name: admin-keys
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{/* Annotations that tell Prometheus what to scrape. */}}
{{- define "octavo.scrapeAnnotations" -}}
{{- if and .Values.monitoring.enabled .Values.monitoring.annotations }}
prometheus.io/scrape: "true"
prometheus.io/port: "9090"
{{- end }}
{{- end }}

{{/* How many a workload has while it is scaled: as many as it has now, or switching that on would leave one. The context is (list $ "apps/v1" "Deployment" "gateway"). */}}
{{- define "octavo.replicas" -}}
{{- $root := index . 0 -}}{{- $values := index $root.Values (index . 3) -}}
{{- if not $values.autoscaling.enabled }}
replicas: {{ int $values.replicas }}
{{- else }}
{{- $name := printf "%s-%s" (include "octavo.fullname" $root) (index . 3) -}}
{{- $now := lookup (index . 1) (index . 2) $root.Release.Namespace $name | default dict -}}
{{- with dig "spec" "replicas" 0 $now }}
replicas: {{ int . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Seconds until the first gateway can be ready: the model is fetched, then loaded. */}}
{{- define "octavo.loadSeconds" -}}
{{- add (ternary (int .Values.model.waitSeconds) 0 .Values.model.fetch.enabled) (int .Values.engine.worker.startupSeconds) 600 -}}
{{- end }}

{{- define "octavo.hopFlags" -}}
{{- if .Values.transport.tls.enabled }}
- --hop-certificate=/etc/octavo/hop/tls.crt
- --hop-key=/etc/octavo/hop/tls.key
- --hop-ca=/etc/octavo/hop/ca.crt
{{- end }}
{{- end }}

{{- define "octavo.hopMount" -}}
{{- if .Values.transport.tls.enabled }}
- name: hop-tls
  mountPath: /etc/octavo/hop
  readOnly: true
{{- end }}
{{- end }}

{{/* The context is (list $ "gateway" or "engine"). */}}
{{- define "octavo.hopVolume" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.transport.tls.enabled }}
- name: hop-tls
  secret:
    secretName: {{ default (printf "%s-%s-hop-tls" (include "octavo.fullname" $root) (index . 1)) $root.Values.transport.tls.existingSecret }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- define "octavo.tlsSecret" -}}
{{- default (printf "%s-tls" (include "octavo.fullname" .)) .Values.tls.existingSecret -}}
{{- end }}
