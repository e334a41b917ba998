"""The fields of every kind the command line handles, in the order of Calico's Go structs.

The order makes stored bytes equal Calico's; the types let a mistake be reported by its path before
anything is written. A `?` marks a Go pointer, whose zero value (false, 0, an empty list) is stored
when given. Source: Calico 3.32 `api/pkg/apis/projectcalico/v3` and its internal kinds, as facts.
"""

from __future__ import annotations

from cymric.cli.schema import Fields, fields

METADATA = fields(
    "name generateName namespace selfLink uid resourceVersion generation:int "
    "creationTimestamp deletionTimestamp:string? deletionGracePeriodSeconds:int? labels:map "
    "annotations:map ownerReferences:any finalizers:strings managedFields:any"
)

IP_POOL = fields(
    "cidr vxlanMode ipipMode natOutgoing:bool disabled:bool disableBGPExport:bool blockSize:int "
    "nodeSelector namespaceSelector allowedUses:strings assignmentMode:string?"
)
IP_RESERVATION = fields("reservedCIDRs:strings")

_PASSWORD = fields("secretKeyRef:object", secretKeyRef=fields("name key optional:bool?"))
BGP_PEER = fields(
    "node nodeSelector peerIP asNumber:asn localASNumber:asn? peerSelector "
    "keepOriginalNextHop:bool nextHopMode:string? password:object? sourceAddress "
    "maxRestartTime:duration? keepaliveTime:duration? numAllowedLocalASNumbers:int? "
    "ttlSecurity:int? reachableBy filters:strings localWorkloadSelector reversePeering:string?",
    password=_PASSWORD,
)
_CIDR = fields("cidr")
BGP_CONFIGURATION = fields(
    "logSeverityScreen nodeToNodeMeshEnabled:bool? asNumber:asn? serviceLoadBalancerIPs:objects "
    "serviceExternalIPs:objects serviceClusterIPs:objects serviceLoadBalancerAggregation:string? "
    "communities:objects prefixAdvertisements:objects listenPort:int nodeMeshPassword:object? "
    "nodeMeshMaxRestartTime:duration? bindMode:string? ignoredInterfaces:strings "
    "localWorkloadPeeringIPV4 localWorkloadPeeringIPV6 programClusterRoutes:string? "
    "ipv4NormalRoutePriority:int? ipv6NormalRoutePriority:int?",
    serviceLoadBalancerIPs=_CIDR,
    serviceExternalIPs=_CIDR,
    serviceClusterIPs=_CIDR,
    communities=fields("name value"),
    prefixAdvertisements=fields("cidr communities:strings"),
    nodeMeshPassword=_PASSWORD,
)
_FILTER_RULE = fields(
    "cidr prefixLength:object? source interface peerType communities:object? asPathPrefix:asns "
    "priority:int? matchOperator action operations:objects",
    prefixLength=fields("min:int? max:int?"),
    communities=fields("values:strings"),
    operations=fields(
        "addCommunity:object? prependASPath:object? setPriority:object?",
        addCommunity=fields("value"),
        prependASPath=fields("prefix:asns"),
        setPriority=fields("value:int"),
    ),
)
BGP_FILTER = fields(
    "exportV4:objects importV4:objects exportV6:objects importV6:objects",
    exportV4=_FILTER_RULE,
    importV4=_FILTER_RULE,
    exportV6=_FILTER_RULE,
    importV6=_FILTER_RULE,
)

NODE = fields(
    "bgp:object? ipv4VXLANTunnelAddr vxlanTunnelMACAddr ipv6VXLANTunnelAddr vxlanTunnelMACAddrV6 "
    "orchRefs:objects wireguard:object? addresses:objects interfaces:objects",
    bgp=fields("asNumber:asn? ipv4Address ipv6Address ipv4IPIPTunnelAddr routeReflectorClusterID"),
    orchRefs=fields("nodeName orchestrator"),
    wireguard=fields("interfaceIPv4Address interfaceIPv6Address"),
    addresses=fields("address type"),
    interfaces=fields("name addresses:strings"),
)

WORKLOAD_ENDPOINT = fields(
    "orchestrator workload node containerID pod endpoint serviceAccountName ipNetworks:strings "
    "ipNATs:objects ipv4Gateway ipv6Gateway profiles:strings interfaceName mac ports:objects "
    "allowSpoofedSourcePrefixes:strings qosControls:any",
    ipNATs=fields("internalIP externalIP"),
    ports=fields("name protocol:port port:int hostPort:int hostIP"),
)

_ENTITY = fields(
    "nets:strings selector namespaceSelector services:object? ports:ports notNets:strings "
    "notSelector notPorts:ports serviceAccounts:object?",
    services=fields("name namespace"),
    serviceAccounts=fields("names:strings selector"),
)
_ICMP = fields("type:int? code:int?")
_RULE = fields(
    "action ipVersion:int? protocol:port? icmp:object? notProtocol:port? notICMP:object? "
    "source:object destination:object http:any metadata:object?",
    icmp=_ICMP,
    notICMP=_ICMP,
    source=_ENTITY,
    destination=_ENTITY,
    metadata=fields("annotations:map"),
)
_POLICY = "tier order:number? ingress:objects egress:objects selector types:strings "
NETWORK_POLICY = fields(
    _POLICY + "serviceAccountSelector performanceHints:strings", ingress=_RULE, egress=_RULE
)
GLOBAL_NETWORK_POLICY = fields(
    _POLICY + "doNotTrack:bool preDNAT:bool applyOnForward:bool serviceAccountSelector "
    "namespaceSelector performanceHints:strings",
    ingress=_RULE,
    egress=_RULE,
)
_STAGED = fields("stagedAction")
STAGED_NETWORK_POLICY = {**_STAGED, **NETWORK_POLICY}
STAGED_GLOBAL_NETWORK_POLICY = {**_STAGED, **GLOBAL_NETWORK_POLICY}
STAGED_KUBERNETES_NETWORK_POLICY = fields(
    "stagedAction podSelector:any ingress:any egress:any policyTypes:strings"
)
TIER = fields("order:number? defaultAction:string?")
NETWORK_SET = fields("nets:strings")
HOST_ENDPOINT = fields(
    "node interfaceName expectedIPs:strings profiles:strings ports:objects",
    ports=fields("name protocol:port port:int"),
)
PROFILE = fields("ingress:objects egress:objects labelsToApply:map", ingress=_RULE, egress=_RULE)

CLUSTER_INFORMATION = fields("clusterGUID clusterType calicoVersion datastoreReady:bool? variant")

_FAILSAFE = fields("protocol port:int net")
_RANGE = fields("min:int max:int")
FELIX_CONFIGURATION = fields(
    "nodeSelector useInternalDataplaneDriver:bool? dataplaneDriver "
    "dataplaneWatchdogTimeout:duration? ipv6Support:bool? routeRefreshInterval:duration? "
    "interfaceRefreshInterval:duration? iptablesRefreshInterval:duration? "
    "iptablesPostWriteCheckInterval:duration? iptablesLockProbeInterval:duration? "
    "featureDetectOverride featureGates ipsetsRefreshInterval:duration? maxIpsetSize:int? "
    "iptablesBackend:string? xdpRefreshInterval:duration? netlinkTimeout:duration? metadataAddr "
    "metadataPort:int? openstackRegion interfacePrefix interfaceExclude chainInsertMode "
    "defaultEndpointToHostAction iptablesFilterAllowAction iptablesMangleAllowAction "
    "iptablesFilterDenyAction logPrefix logActionRateLimit:string? logActionRateLimitBurst:int? "
    "logFilePath logSeverityFile logSeverityScreen logSeveritySys logDebugFilenameRegex "
    "ipipEnabled:bool? ipipMTU:int? vxlanEnabled:bool? vxlanMTU:int? vxlanMTUV6:int? "
    "vxlanPort:int? vxlanVNI:int? allowVXLANPacketsFromWorkloads:bool? "
    "allowIPIPPacketsFromWorkloads:bool? reportingInterval:duration? reportingTTL:duration? "
    "endpointReportingEnabled:bool? endpointReportingDelay:duration? endpointStatusPathPrefix "
    "iptablesMarkMask:int? disableConntrackInvalidCheck:bool? healthEnabled:bool? "
    "healthHost:string? healthPort:int? healthTimeoutOverrides:objects floatingIPs:string? "
    "prometheusMetricsEnabled:bool? prometheusMetricsHost prometheusMetricsPort:int? "
    "prometheusGoMetricsEnabled:bool? prometheusProcessMetricsEnabled:bool? "
    "prometheusWireGuardMetricsEnabled:bool? prometheusMetricsCAFile:string? "
    "prometheusMetricsCertFile:string? prometheusMetricsKeyFile:string? "
    "prometheusMetricsClientAuth:string? failsafeInboundHostPorts:objects? "
    "failsafeOutboundHostPorts:objects? kubeNodePortRanges:ports? policySyncPathPrefix "
    "usageReportingEnabled:bool? usageReportingInitialDelay:duration? "
    "usageReportingInterval:duration? natPortRange:port? natOutgoingAddress "
    "natOutgoingExclusions:string? deviceRouteSourceAddress deviceRouteSourceAddressIPv6 "
    "deviceRouteProtocol:int? removeExternalRoutes:bool? programClusterRoutes:string? "
    "ipForwarding externalNodesList:strings? debugMemoryProfilePath "
    "debugDisableLogDropping:bool? debugSimulateCalcGraphHangAfter:duration? "
    "debugSimulateDataplaneHangAfter:duration? debugSimulateDataplaneApplyDelay:duration? "
    "debugHost:string? debugPort:int? iptablesNATOutgoingInterfaceFilter "
    "sidecarAccelerationEnabled:bool? xdpEnabled:bool? genericXDPEnabled:bool? "
    "nftablesMode:string? nftablesRefreshInterval:duration? nftablesFilterAllowAction "
    "nftablesMangleAllowAction nftablesFilterDenyAction nftablesMarkMask:int? "
    "istioAmbientMode:string? istioDSCPMark:port? cgroupV2Path "
    "flowLogsPolicyEvaluationMode:string? flowLogsFlushInterval:duration? "
    "flowLogsCollectorDebugTrace:bool? flowLogsGoldmaneServer:string? "
    "flowLogsLocalReporter:string? routeSource routeTableRanges:objects? routeTableRange:object? "
    "routeSyncDisabled:bool? ipv4NormalRoutePriority:int? ipv4ElevatedRoutePriority:int? "
    "ipv6NormalRoutePriority:int? ipv6ElevatedRoutePriority:int? "
    "liveMigrationRouteConvergenceTime:duration? wireguardEnabled:bool? wireguardEnabledV6:bool? "
    "wireguardThreadingEnabled:bool? wireguardListeningPort:int? wireguardListeningPortV6:int? "
    "wireguardRoutingRulePriority:int? wireguardInterfaceName wireguardInterfaceNameV6 "
    "wireguardMTU:int? wireguardMTUV6:int? wireguardHostEncryptionEnabled:bool? "
    "wireguardKeepAlive:duration? awsSrcDstCheck:string? serviceLoopPrevention "
    "workloadSourceSpoofing mtuIfacePattern windowsManageFirewallRules:string? "
    "goGCThreshold:int? goMemoryLimitMB:int? goMaxProcs:int? requireMTUFile:bool?",
    healthTimeoutOverrides=fields("name timeout:duration"),
    failsafeInboundHostPorts=_FAILSAFE,
    failsafeOutboundHostPorts=_FAILSAFE,
    routeTableRanges=_RANGE,
    routeTableRange=_RANGE,
)


def resource(spec: Fields, *, status: bool = False) -> Fields:
    """A whole v3 object around its spec; `status` for kinds that always carry one."""
    return fields(
        "kind apiVersion metadata:object? spec:object? "
        + ("status:any?" if status else "status:any"),
        metadata=METADATA,
        spec=spec,
    )
