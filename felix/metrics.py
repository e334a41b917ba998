"""Felix' metrics under Calico's names, so that existing dashboards and alerts go on working.

prometheus_client adds `_total` to the name of every counter, which Calico's have not; what counts
is therefore kept in gauges that only grow.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Gauge, Histogram, Summary


def growing(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
    """A count under exactly this name."""
    return Gauge(name, text, labels)


RESTORES = growing("felix_iptables_restore_calls", "iptables-restore runs.")
RESTORE_ERRORS = growing("felix_iptables_restore_errors", "iptables-restore runs that failed.")
SAVES = growing("felix_iptables_save_calls", "iptables-save runs.")
SAVE_ERRORS = growing("felix_iptables_save_errors", "iptables-save runs that failed.")
TABLE_LINES = growing("felix_iptables_lines_executed", "Lines written.", ["ip_version", "table"])
TABLE_CHAINS = Gauge("felix_iptables_chains", "Chains of ours.", ["ip_version", "table"])
TABLE_RULES = Gauge("felix_iptables_rules", "Rules of ours.", ["ip_version", "table"])

SET_CALLS = growing("felix_ipset_calls", "ipset runs.")
SET_ERRORS = growing("felix_ipset_errors", "ipset runs that failed.")
SET_LINES = growing("felix_ipset_lines_executed", "Lines written to ipset.")
SETS = Gauge("felix_ipsets_calico", "Sets of ours.", ["ip_version"])

APPLY_TIME = Summary(
    "felix_int_dataplane_apply_time_seconds", "How long it takes to apply the desired state."
)
APPLY_FAILURES = growing("felix_int_dataplane_failures", "Applications that must be repeated.")
REPAIRS = growing("cymric_felix_table_repairs", "Tables repaired after others changed them.")
CONNECTIONS_ENDED = growing(
    "cymric_felix_connections_ended", "Established connections that policy denies and that ended."
)
STAGED = growing(
    "cymric_felix_staged_changes", "Changes of policy for which rules looked at copies of sets."
)
UPDATES = growing("felix_calc_graph_updates_processed", "Updates from the datastore.")
RESYNC_STATE = Gauge(
    "felix_resync_state", "1 waiting for the datastore, 2 resync in progress, 3 in sync."
)
LOCAL_ENDPOINTS = Gauge("felix_active_local_endpoints", "Workload endpoints on this node.")
ROUTES = Gauge("felix_route_table_num_routes", "Routes of ours.", ["table"])
CLUSTER_COUNTS = {
    "WorkloadEndpoint": Gauge("felix_cluster_num_workload_endpoints", "In the whole cluster."),
    "HostEndpoint": Gauge("felix_cluster_num_host_endpoints", "In the whole cluster."),
    "Node": Gauge("felix_cluster_num_hosts", "In the whole cluster."),
    "Tier": Gauge("felix_cluster_num_tiers", "In the whole cluster."),
    "Profile": Gauge("felix_cluster_num_profiles", "In the whole cluster."),
}
KNOWLEDGE_AGE = Gauge("cymric_felix_knowledge_age_seconds", "Since the datastore was last heard.")
LOCAL_POLICIES = Gauge("felix_active_local_policies", "Policies that act on this node.")
LOCAL_SELECTORS = Gauge("felix_active_local_selectors", "Sets that rules of this node name.")
CLUSTER_POLICIES = Gauge("felix_cluster_num_policies", "In the whole cluster.")
EVALUATIONS = growing("felix_label_index_selector_evals", "Selectors tried on labels.")
CALCULATION_TIME = Summary(
    "felix_calc_graph_update_time_seconds", "How long it takes to work out the desired state."
)
FIRST_APPLIED = Gauge(
    "felix_int_dataplane_initial_resync_time_seconds", "From the start to the first application."
)
TRIALS = Gauge("cymric_felix_trials", "Objects that are undone soon unless confirmed.")
CANARY_MISSED = growing(
    "cymric_felix_canary_missed", "Packets sent to see whether they pass our chains, and did not."
)
PROBLEMS = Gauge("cymric_felix_problems", "Objects that are not enforced as written.")
PROGRAMMED = Histogram(
    "cymric_felix_endpoint_programmed_seconds",
    "From the first word of a new endpoint to its status file, by who brought that word.",
    ["source"],
    buckets=(0.002, 0.004, 0.006, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
HINTS = growing(
    "cymric_felix_hints", "Endpoints told of directly, by what became of them.", ["result"]
)
