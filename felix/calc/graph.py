"""Policy, worked out change by change: what is active here, its rules and sets, and their order.

    endpoints of this node ─┬▶ label index ─▶ active policies ─▶ rules ─▶ sets wanted ─┐
    policies ───────────────┘        │                                                 ▼
    tiers ───────────────────────────┴▶ tiers per endpoint     members, of all nodes' endpoints

A policy is active when it can act on an endpoint of this node; only active policies, the profiles
in use and the sets they name exist in the result. `put` only notes; `flush` works off what was
noted, in an order in which each step finds the ones before it done. Results that did not change
stay the same objects. Source: Calico 3.32 felix/calc, in our own words.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from cymric.model.endpoints import HostEndpoint
from cymric.model.keys import ResourceKey
from cymric.model.policy import GlobalNetworkPolicy, NetworkPolicy, Profile, Tier
from felix.calc import profiles
from felix.calc.conversion import Converted, SetSpec, convert
from felix.calc.label_index import LabelIndex
from felix.calc.members import Owner, SetMembers, owner_of
from felix.calc.policies import IPSet, Policy, PolicyId
from felix.calc.resolver import EndpointTiers, Place, PolicyClass, TierOrder, place_of, resolve
from felix.calc.selection import of_policy
from felix.calc.values import Problem, ProfileRules

KINDS = frozenset(
    {
        "GlobalNetworkPolicy",
        "GlobalNetworkSet",
        "HostEndpoint",
        "NetworkPolicy",
        "NetworkSet",
        "Profile",
        "Tier",
        "WorkloadEndpoint",
    }
)
"""What the graph is fed with. Staged policies are not: nothing may depend on them."""

SHORT_KINDS = {"NetworkPolicy": "np", "GlobalNetworkPolicy": "gnp"}
_ENDPOINT_KINDS = frozenset({"HostEndpoint", "WorkloadEndpoint"})
_OWNER_KINDS = _ENDPOINT_KINDS | {"NetworkSet", "GlobalNetworkSet"}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_NOTHING = EndpointTiers()

StoredPolicy = NetworkPolicy | GlobalNetworkPolicy


class PolicyGraph:
    """See the chapter."""

    def __init__(self) -> None:
        self._noted: dict[ResourceKey, object | None] = {}
        self._policies: dict[PolicyId, StoredPolicy] = {}
        self._places: dict[PolicyId, Place] = {}
        self._profiles: dict[str, Profile] = {}
        self._tiers = TierOrder()
        self._owners: dict[ResourceKey, Owner] = {}
        self._local_wanted: frozenset[ResourceKey] = frozenset()
        self._index: LabelIndex[PolicyId, ResourceKey] = LabelIndex(self._on_match)
        self._uses: Counter[PolicyId] = Counter()
        self._touched_policies: set[PolicyId] = set()
        self._touched_endpoints: set[ResourceKey] = set()
        self._members = SetMembers()
        self._set_uses: Counter[str] = Counter()
        self._loose_sets: set[str] = set()
        self._sets_by_user: dict[PolicyId | str, tuple[str, ...]] = {}
        self._troubles: dict[PolicyId | str, tuple[str, ...]] = {}
        self._problems: tuple[Problem, ...] | None = ()
        self._profile_names: frozenset[str] = frozenset()
        self.policies: Mapping[PolicyId, Policy] = {}
        self.profiles: Mapping[str, ProfileRules] = {}
        self.ip_sets: Mapping[str, IPSet] = {}
        self._tiers_by_endpoint: dict[ResourceKey, EndpointTiers] = {}

    @property
    def evaluations(self) -> int:
        """How many selectors were tried so far."""
        return self._index.evaluations + self._members.evaluations

    def put(self, key: ResourceKey, stored: object | None) -> None:
        """Note an object of one of `KINDS`, or that there is none."""
        self._noted[key] = stored

    def tiers_of(self, key: ResourceKey) -> EndpointTiers:
        """The tiers of an endpoint of this node, after `flush`."""
        return self._tiers_by_endpoint.get(key, _NOTHING)

    def flush(self, local: frozenset[ResourceKey], profile_names: frozenset[str]) -> None:
        """Work off what was noted. `local` are the endpoints that are under policy here."""
        noted, self._noted = self._noted, {}
        touched_profiles: set[str] = set()
        for key, stored in noted.items():
            if key.kind == "Profile":
                self._put_profile(key.name, stored if isinstance(stored, Profile) else None)
                touched_profiles.add(key.name)
            elif key.kind == "Tier":
                self._put_tier(key.name, stored if isinstance(stored, Tier) else None)
            elif key.kind in _OWNER_KINDS:
                self._put_owner(key, owner_of(stored))
        self._put_local(local, noted)
        for key, stored in noted.items():
            if key.kind in SHORT_KINDS:
                found = stored if isinstance(stored, NetworkPolicy | GlobalNetworkPolicy) else None
                self._put_policy(policy_id(key), found)
        self._work_out_policies()
        self._work_out_profiles(profile_names, touched_profiles)
        self._forget_sets()
        self.ip_sets = self._members.sets()
        self._work_out_tiers()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is not done as written, of what is active here."""
        if self._problems is None:
            self._problems = tuple(self._found_problems())
        return self._problems

    def _found_problems(self) -> Iterator[Problem]:
        for user, troubles in self._troubles.items():
            subject = f"Profile {user}" if isinstance(user, str) else f"policy {user}"
            yield from (Problem(subject, trouble) for trouble in troubles)
        for place in map(self._places.__getitem__, self.policies):
            if place.tier not in self._tiers and place.tier != "default":
                reason = f"its tier {place.tier} does not exist: after all others, ending in deny"
                yield Problem(f"policy {place.id}", reason)

    # --- what is noted ----------------------------------------------------------------------------

    def _put_profile(self, name: str, stored: Profile | None) -> None:
        if stored is None:
            self._profiles.pop(name, None)
        else:
            self._profiles[name] = stored
        labels = {} if stored is None else stored.spec.labels_to_apply
        self._members.put_profile(name, labels)
        self._index.put_parent(name, labels)

    def _put_tier(self, name: str, stored: Tier | None) -> None:
        if self._tiers.put(name, stored):
            self._problems = None
            for place in self._places.values():
                if place.tier == name:
                    self._touched_endpoints.update(self._index.items_of(place.id))

    def _put_owner(self, key: ResourceKey, owner: Owner | None) -> None:
        self._members.put_owner(key, owner)
        if key.kind not in _ENDPOINT_KINDS:
            return
        if owner is None:
            self._owners.pop(key, None)
        else:
            self._owners[key] = owner

    def _put_local(self, local: frozenset[ResourceKey], noted: Iterable[ResourceKey]) -> None:
        for key in self._local_wanted - local:
            self._index.drop_item(key)
            self._touched_endpoints.add(key)
        new = local - self._local_wanted
        for key in (*new, *(key for key in noted if key in local and key not in new)):
            if owner := self._owners.get(key):
                self._index.put_item(key, owner.labels, owner.profiles)
            else:
                self._index.drop_item(key)
        self._local_wanted = local

    def _put_policy(self, id_: PolicyId, stored: StoredPolicy | None) -> None:
        before = self._policies.get(id_)
        if before == stored:
            return
        self._touched_policies.add(id_)
        if stored is None:
            self._index.drop_selector(id_)
            del self._policies[id_], self._places[id_]
            return
        place = place_of(id_, stored)
        if self._places.get(id_) != place:
            # Whom it matches is told anew: whether that makes it active can have changed as well.
            self._index.drop_selector(id_)
        self._policies[id_], self._places[id_] = stored, place
        self._index.put_selector(id_, of_policy(stored))

    def _on_match(self, id_: PolicyId, key: ResourceKey, is_match: bool) -> None:
        is_host = key.kind == "HostEndpoint"
        if not is_host and self._places[id_].policy_class is not PolicyClass.NORMAL:
            return
        self._touched_endpoints.add(key)
        self._touched_policies.add(id_)
        self._uses[id_] += 1 if is_match else -1

    # --- what follows -----------------------------------------------------------------------------

    def _work_out_policies(self) -> None:
        changed: dict[PolicyId, Policy | None] = {}
        for id_ in self._touched_policies:
            is_active = self._uses[id_] > 0
            if not is_active:
                del self._uses[id_]
                if id_ in self.policies:
                    changed[id_] = None
                    self._use_sets(id_, ())
                continue
            policy = self._converted(id_, self._policies[id_], self._places[id_])
            if policy != self.policies.get(id_):
                changed[id_] = policy
        self._touched_policies.clear()
        if changed:
            self._problems = None
            merged = {**self.policies, **changed}
            self.policies = {id_: one for id_, one in merged.items() if one is not None}

    def _converted(self, id_: PolicyId, stored: StoredPolicy, place: Place) -> Policy:
        namespace = stored.metadata.namespace
        empty = Converted((), (), ())
        spec = stored.spec
        inbound = convert("ingress", spec.ingress, namespace) if place.is_ingress else empty
        outbound = convert("egress", spec.egress, namespace) if place.is_egress else empty
        self._use_sets(id_, (inbound, outbound))
        return Policy(
            id_, place.tier, inbound.rules, outbound.rules, stored.reevaluates_established
        )

    def _work_out_profiles(self, names: frozenset[str], touched: set[str]) -> None:
        gone = self._profile_names - names
        todo = (names - self._profile_names) | (names & touched)
        self._profile_names = names
        if not gone and not todo:
            return
        found = {name: rules for name, rules in self.profiles.items() if name not in gone}
        for name in gone:
            self._use_sets(name, ())
        for name in todo:
            rules, directions = profiles.rules_of(name, self._profiles.get(name))
            self._use_sets(name, directions)
            if rules != found.get(name):
                found[name] = rules
        self.profiles = found

    def _use_sets(self, user: PolicyId | str, directions: Iterable[Converted]) -> None:
        """Note which sets a policy or profile names, and what is wrong with its rules."""
        specs: dict[str, SetSpec] = {}
        troubles: list[str] = []
        for direction in directions:
            specs.update((spec.id, spec) for spec in direction.sets)
            troubles += direction.troubles
        if before := self._sets_by_user.pop(user, ()):
            self._set_uses.subtract(before)
            self._loose_sets.update(before)
        self._set_uses.update(specs.keys())
        for spec in specs.values():
            self._members.want(spec)
        if specs:
            self._sets_by_user[user] = tuple(specs)
        before_troubles = self._troubles.pop(user, ())
        if troubles:
            self._troubles[user] = tuple(troubles)
        if before_troubles != tuple(troubles):
            self._problems = None

    def _forget_sets(self) -> None:
        for set_id in self._loose_sets:
            if not self._set_uses[set_id]:
                del self._set_uses[set_id]
                self._members.forget(set_id)
        self._loose_sets.clear()

    def _work_out_tiers(self) -> None:
        for key in self._touched_endpoints:
            places = [self._places[id_] for id_ in self._index.selectors_of(key)]
            found = resolve(places, self._tiers, is_host=key.kind == "HostEndpoint")
            if found == _NOTHING:
                self._tiers_by_endpoint.pop(key, None)
            elif found != self._tiers_by_endpoint.get(key):
                self._tiers_by_endpoint[key] = found
        self._touched_endpoints.clear()


def policy_id(key: ResourceKey) -> PolicyId:
    """How a stored policy is called in rules: by the name in its key."""
    return PolicyId(SHORT_KINDS[key.kind], key.namespace and safe(key.namespace), safe(key.name))


def safe(name: str) -> str:
    """A name that cannot break a rule's text; one that could is replaced by a digest of it."""
    if _NAME.fullmatch(name):
        return name
    return "unusable-" + hashlib.sha256(name.encode()).hexdigest()[:32]


def host_profiles(stored: HostEndpoint) -> tuple[str, ...]:
    """The profiles of a host endpoint, by names that are safe in rules."""
    return tuple(map(safe, stored.spec.profiles))
