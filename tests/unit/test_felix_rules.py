"""Rules, names and hashes are Calico's, to the character."""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.model.net import parse_address, parse_network
from felix.calc.config import FelixConfig, ProtocolPort
from felix.calc.sources import from_object, settle
from felix.calc.values import (
    Desired,
    Endpoint,
    EndpointId,
    EntityMatch,
    FloatingAddress,
    HostEndpoint,
    Policy,
    PolicyId,
    PolicyRule,
    PortRange,
    ProfileRules,
    TierPolicies,
    Verdict,
)
from felix.iptables import render
from felix.iptables.plan import render_table
from felix.rules import dispatch, nat
from felix.rules.marks import allocate
from felix.rules.names import limited, set_name
from felix.rules.policy import RuleChains
from felix.rules.rule import (
    ACCEPT,
    DROP,
    REJECT,
    RETURN,
    Action,
    Chain,
    ClearMark,
    Goto,
    Jump,
    Log,
    Masquerade,
    Match,
    Rule,
    SetMark,
    SourceNAT,
)
from felix.rules.tables import TableContents, contents

GOLDEN = Path(__file__).parent.parent / "golden" / "felix_filter_v3.32.rules"
SERVICES = parse_network("198.19.32.0/20")
MARKS = allocate(0xFFFF0000)
ALLOW_ALL = ProfileRules("kns.prod", (PolicyRule(Verdict.ALLOW),), (PolicyRule(Verdict.ALLOW),))
ADDRESSES = (parse_address("198.19.16.2"), parse_address("fd00:19::2"))
POD = Endpoint(
    EndpointId("k8s", "prod/web-1", "eth0"), "cali2b4f0b7d9aa", "", ADDRESSES, ("kns.prod",)
)


def desired(**config: object) -> Desired:
    """A node with one pod."""
    return Desired(
        config=FelixConfig(**config),  # type: ignore[arg-type]
        endpoints=(POD,),
        profiles={"kns.prod": ALLOW_ALL},
        masquerade_pools=frozenset([parse_network("198.19.16.0/21")]),
    )


ALLOW_WEB = Policy(
    PolicyId("np", "prod", "allow-web"),
    "default",
    inbound=(
        PolicyRule(
            Verdict.ALLOW,
            protocol="tcp",
            source=EntityMatch(set_ids=("s:SKAWfwYhGs-kFLTCZp1Bzv8Eko5HdcRpat-s4g",)),
            destination=EntityMatch(ports=(PortRange(80, 80),)),
        ),
    ),
)


def with_policy(**config: object) -> Desired:
    """The same with a policy for what the pod receives."""
    tier = TierPolicies("default", inbound=(ALLOW_WEB.id,))
    return replace(
        desired(**config),
        endpoints=(replace(POD, tiers=(tier,)),),
        policies={ALLOW_WEB.id: ALLOW_WEB},
    )


def lines(table: str, wanted: Desired) -> list[str]:
    """Every rule of a table as restore input."""
    rendered = render_table(contents(wanted)[table])
    found = [
        f"-A {chain.name} {text}" for chain in rendered.chains.values() for text in chain.rules
    ]
    for name, hook in rendered.hooks.items():
        found += [f"-A {name} {rule.text}" for rule in (*hook.inserts, *hook.appends)]
    return found


def hashes(chain: str, *bodies: str) -> list[str]:
    """The hashes of rules in a chain."""
    return list(render.hash_chain(chain, bodies))


def test_filter_table_is_the_golden_one() -> None:
    """Text and hash of every rule equal Calico's, those of a policy included."""
    golden = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    found = lines("filter", with_policy(default_endpoint_to_host_action="return"))
    assert len(golden) > 45
    assert not [line for line in golden if line not in found]
    assert not [line for line in found if line not in golden]


@pytest.mark.parametrize(
    ("chain", "bodies", "expected"),
    [
        pytest.param(
            "FORWARD*appends*",
            [
                '-m comment --comment "Policy explicitly accepted packet."'
                " -m mark --mark 0x10000/0x10000 --jump ACCEPT",
                "--jump MARK --set-mark 0x10000/0x10000",
            ],
            ["S93hcgKJrXEqnTfs", "mp77cMpurHhyjLrM"],
            id="appended to FORWARD",
        ),
        pytest.param(
            "POSTROUTING*appends*",
            ["--jump cali-POSTROUTING"],
            ["0i8pjzKKPyA34aQD"],
            id="appended to nat POSTROUTING",
        ),
        pytest.param(
            "FORWARD", ["--jump cali-FORWARD"], ["wUHhoiAYhphO9Mso"], id="inserted into FORWARD"
        ),
        pytest.param(
            "cali-FORWARD",
            [
                "--jump MARK --set-mark 0/0xe0000",
                "-m mark --mark 0/0x10000 --jump cali-from-hep-forward",
            ],
            ["vjrMJCRpqwy5oRoX", "A_sPAO0mcxbT9mOV"],
            id="as version 3.28 has it",
        ),
        pytest.param(
            "cali-FORWARD",
            [
                "--jump MARK --set-mark 0/0x1a0000",
                "-m mark --mark 0/0x10000 --jump cali-from-hep-forward",
            ],
            ["W_vvds1Nw3n9QE2f", "ZfgmjuiLaA8Pg0kp"],
            id="as version 3.32 has it",
        ),
        pytest.param(
            "cali-nat-outgoing",
            [
                "-m set --match-set cali40masq-ipam-pools src"
                " -m set ! --match-set cali40all-ipam-pools dst --jump MASQUERADE --random-fully"
            ],
            ["flqWnvo8yq4ULQLa"],
            id="nat-outgoing of version 3.28",
        ),
    ],
)
def test_hash_vectors(chain: str, bodies: list[str], expected: list[str]) -> None:
    """Hashes are those that real systems show."""
    assert hashes(chain, *bodies) == expected


def test_nat_outgoing_chain_has_the_known_hash() -> None:
    """The one rule of cali-nat-outgoing is Calico 3.32's; without pools the chain is empty."""
    chain = render.chain(nat.outgoing_chain(FelixConfig(), is_wanted=True))
    assert chain.hashes == ("W_qq_N2KSTWyCvrX",)
    assert nat.outgoing_chain(FelixConfig(), is_wanted=False).rules == ()


def test_nat_outgoing_with_ports_address_and_exclusions() -> None:
    """A port range needs tcp and udp rules of its own; hosts may be left out; SNAT is possible."""
    config = FelixConfig(
        nat_port_range="32768-65535",
        nat_outgoing_address="192.0.2.7",
        nat_outgoing_exclusions="ippoolsandhostips",
        nat_outgoing_interface_filter="eth+",
    )
    match = (
        "-m set --match-set cali40masq-ipam-pools src"
        " -m set ! --match-set cali40network-ip-pools dst"
        " -m set ! --match-set cali40all-hosts-net dst"
    )
    chain = nat.outgoing_chain(config, is_wanted=True)
    assert [render.body(rule) for rule in chain.rules] == [
        f"{match} -p tcp --out-interface eth+"
        " --jump SNAT --to-source 192.0.2.7:32768-65535 --random-fully",
        f"{match} -p tcp --out-interface eth+ --jump RETURN",
        f"{match} -p udp --out-interface eth+"
        " --jump SNAT --to-source 192.0.2.7:32768-65535 --random-fully",
        f"{match} -p udp --out-interface eth+ --jump RETURN",
        f"{match} --out-interface eth+ --jump SNAT --to-source 192.0.2.7 --random-fully",
    ]


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (None, ""),
        (Jump("cali-x"), "--jump cali-x"),
        (Goto("cali-x"), "--goto cali-x"),
        (ACCEPT, "--jump ACCEPT"),
        (REJECT, "--jump REJECT"),
        (SetMark(0x10000), "--jump MARK --set-mark 0x10000/0x10000"),
        (ClearMark(0x1B0000), "--jump MARK --set-mark 0/0x1b0000"),
        (Log("calico-packet: "), '--jump LOG --log-prefix "calico-packet: " --log-level 5'),
        (Masquerade(random_fully=False), "--jump MASQUERADE"),
        (Masquerade("1-9"), "--jump MASQUERADE --to-ports 1-9 --random-fully"),
        (SourceNAT("192.0.2.1", random_fully=False), "--jump SNAT --to-source 192.0.2.1"),
    ],
)
def test_actions(action: Action | None, text: str) -> None:
    """Each action has one spelling."""
    assert render.action(action) == text


def test_comments_are_cleaned_and_cut() -> None:
    """Characters that iptables would print differently become underscores; 256 at most."""
    assert render.comment("a\"b\\c'd%@+=:,./-_ é") == '-m comment --comment "a_b_c_d%@+=:,./-_ _"'
    assert render.comment("x" * 300) == f'-m comment --comment "{"x" * 256}"'


@pytest.mark.parametrize(
    ("prefix", "suffix", "name"),
    [
        ("cali-pi-", "np/prod/allow-web", "cali-pi-np/prod/allow-web"),
        ("cali-pi-", "gnp/allow-from-monitoring", "cali-pi-_z3eKxEQUFen5olEGiTv"),
        ("cali-pri-", "kns.kube-system", "cali-pri-kns.kube-system"),
        ("cali-thfw-", "any-interface-at-all", "cali-thfw-_Nqh4HyA73udmyanQI"),
        ("cali-pri-", "", "cali-pri-_"),
        ("cali-pri-", "x" * 19, "cali-pri-" + "x" * 19),
    ],
)
def test_chain_names(prefix: str, suffix: str, name: str) -> None:
    """Names that fit stay, others end in a hash."""
    assert limited(prefix, suffix) == name
    assert len(name) <= 28


def test_name_that_looks_like_a_hash_is_hashed() -> None:
    """A suffix of exactly the right length that starts with an underscore could be a hash."""
    assert limited("cali-pri-", "_" + "x" * 18) != "cali-pri-_" + "x" * 18


def test_set_names_are_cut() -> None:
    """The kernel takes 31 characters."""
    assert set_name("masq-ipam-pools") == "cali40masq-ipam-pools"
    full = "s:SKAWfwYhGs-kFLTCZp1Bzv8Eko5HdcRpat-s4g"
    assert set_name(full) == "cali40s:SKAWfwYhGs-kFLTCZp1Bzv8"


def test_marks() -> None:
    """Bits are taken lowest first; a mask with too few is refused."""
    assert (MARKS.accept, MARKS.passed, MARKS.drop) == (0x10000, 0x20000, 0x40000)
    assert (MARKS.all, MARKS.all_but_accept) == (0x1B0000, 0x1A0000)
    with pytest.raises(ValueError, match="fewer than 5"):
        allocate(0xF)


@pytest.mark.parametrize(
    ("verdicts", "bodies"),
    [
        pytest.param((), [""], id="no rules: a comment alone"),
        pytest.param(
            (Verdict.ALLOW,),
            ["--jump MARK --set-mark 0x10000/0x10000"],
            id="last return is left out",
        ),
        pytest.param(
            (Verdict.DENY,),
            [
                "--jump MARK --set-mark 0x40000/0x40000",
                "-m mark --mark 0x40000/0x40000 --jump DROP",
            ],
            id="deny",
        ),
        pytest.param(
            (Verdict.LOG, Verdict.PASS, Verdict.ALLOW),
            [
                '--jump LOG --log-prefix "calico-packet: " --log-level 5',
                "--jump RETURN",
                "--jump MARK --set-mark 0x10000/0x10000",
            ],
            id="log, pass (which only ends the profile), allow",
        ),
        pytest.param(None, ["--jump DROP"], id="not renderable: drops everything"),
    ],
)
def test_profile_chains(verdicts: tuple[Verdict, ...] | None, bodies: list[str]) -> None:
    """A profile's verdicts become marks; its first rule names it."""
    written = None if verdicts is None else tuple(map(PolicyRule, verdicts))
    made = RuleChains(FelixConfig(), MARKS, 4)
    made.update({}, {"kns.prod": ProfileRules("kns.prod", written, ())})
    inbound, outbound = made.needed(["cali-pri-kns.prod", "cali-pro-kns.prod"])
    label = '-m comment --comment "Profile kns.prod ingress"'
    expected = [f"{label} {bodies[0]}".strip(), *bodies[1:]]
    assert [render.body(rule) for rule in inbound.rules] == expected
    assert inbound.name == "cali-pri-kns.prod"
    assert outbound.name == "cali-pro-kns.prod"


def test_dispatch_groups_by_the_character_after_the_common_prefix() -> None:
    """A group of one is matched in the root, a larger one in a child with the same end."""
    root, child = dispatch.from_workload().chains(["cali12", "cali13", "cali2"])
    assert [render.body(rule) for rule in root.rules] == [
        "--in-interface cali1+ --goto cali-from-wl-dispatch-1",
        "--in-interface cali2 --goto cali-fw-cali2",
        '-m comment --comment "Unknown interface" --jump DROP',
    ]
    assert child.name == "cali-from-wl-dispatch-1"
    assert [render.body(rule) for rule in child.rules] == [
        "--in-interface cali12 --goto cali-fw-cali12",
        "--in-interface cali13 --goto cali-fw-cali13",
        '-m comment --comment "Unknown interface" --jump DROP',
    ]


def walk(chains: tuple[Chain, ...], interface: str) -> str:
    """Where a packet of `interface` ends up: an endpoint chain, or DROP."""
    by_name = {chain.name: chain for chain in chains}
    chain = chains[0]
    while True:
        for rule in chain.rules:
            pattern = rule.match.fragments[0].split()[1] if rule.match.fragments else "+"
            is_met = (
                interface.startswith(pattern[:-1]) if pattern[-1] == "+" else pattern == interface
            )
            if is_met:
                break
        if not isinstance(rule.action, Goto):
            return "DROP"
        if rule.action.chain not in by_name:
            return rule.action.chain
        chain = by_name[rule.action.chain]


interfaces = st.sets(
    st.text(string.hexdigits.lower(), min_size=1, max_size=11).map(lambda text: "cali" + text),
    max_size=40,
)


@given(interfaces, interfaces)
def test_dispatch_finds_every_endpoint_and_drops_every_stranger(
    known: set[str], others: set[str]
) -> None:
    """Whatever the names, each endpoint's packets reach its chain, others' are dropped."""
    dispatched = dispatch.to_workload()
    dispatched.chains(sorted(others))  # what was before does not matter
    chains = dispatched.chains(sorted(known))
    assert chains == dispatch.to_workload().chains(sorted(known))
    for name in known:
        assert walk(chains, name) == f"cali-tw-{name}"
    for name in others - known:
        assert walk(chains, name) == "DROP"


def test_nat_postrouting_is_always_appended() -> None:
    """The setting chainInsertMode moves the other jumps only."""
    inserted = contents(desired())
    appended = contents(desired(chain_insert_mode="append"))
    assert "POSTROUTING" in inserted["nat"].appends
    assert "POSTROUTING" in inserted["mangle"].inserts
    assert not appended["filter"].inserts
    rules = appended["filter"].appends["FORWARD"]
    assert rules[0] == Rule(action=Jump("cali-FORWARD"))
    assert len(rules) == 3


def test_every_chain_that_is_jumped_to_exists() -> None:
    """No table names a chain it does not have, and iptables takes every name."""
    for table, content in contents(desired()).items():
        rendered = render_table(content)  # raises KeyError otherwise
        assert all(len(name) <= 28 for name in rendered.chains), table


def test_unreached_profile_chains_are_left_out() -> None:
    """A profile that no endpoint names is not in the kernel."""
    wanted = Desired(profiles={"kns.prod": ALLOW_ALL})
    assert "cali-pri-kns.prod" not in render_table(contents(wanted)["filter"]).chains


@pytest.mark.parametrize(
    ("word", "action"), [("drop", DROP), ("return", RETURN), ("accept", ACCEPT), ("reject", REJECT)]
)
def test_default_endpoint_to_host_action(word: str, action: Action) -> None:
    """The configured action ends the way from pod to host."""
    config = FelixConfig(default_endpoint_to_host_action=word)
    chain = contents(Desired(config=config))["filter"].chains["cali-wl-to-host"]
    assert chain.rules[-1].action == action


def test_several_interface_prefixes_each_have_their_rules() -> None:
    """A second prefix is dispatched and checked for spoofing like the first."""
    config = FelixConfig(interface_prefixes=("cali", "tap"))
    content = contents(Desired(config=config))
    raw = [render.body(rule) for rule in content["raw"].chains["cali-PREROUTING"].rules]
    assert "--in-interface tap+ --jump MARK --set-mark 0x80000/0x80000" in raw
    forward = [render.body(rule) for rule in content["filter"].chains["cali-FORWARD"].rules]
    assert "--out-interface tap+ --jump cali-to-wl-dispatch" in forward


def test_service_ranges_end_here() -> None:
    """What is left for a service range is dropped, rejected or let pass, as configured."""
    for word, expected in (("drop", [DROP]), ("reject", [REJECT]), ("disabled", [])):
        wanted = Desired(
            config=FelixConfig(service_loop_prevention=word), service_cidrs=(SERVICES,)
        )
        chain = contents(wanted)["filter"].chains["cali-cidr-block"]
        assert [rule.action for rule in chain.rules] == expected


def test_same_rule_text_elsewhere_has_another_hash() -> None:
    """A hash depends on the chain and on everything before the rule."""
    body = render.body(Rule(Match().source("192.0.2.0/24"), DROP))
    assert hashes("a", body) != hashes("b", body)
    assert hashes("a", body, body)[0] != hashes("a", body, body)[1]


HOSTS = (
    HostEndpoint("any", "*", ("kns.prod",), (TierPolicies("default", inbound=(ALLOW_WEB.id,)),)),
    HostEndpoint(
        "uplink",
        "eth0",
        (),
        tiers=(TierPolicies("default", outbound=(ALLOW_WEB.id,)),),
        forward_tiers=(TierPolicies("default", inbound=(ALLOW_WEB.id,)),),
        untracked_tiers=(TierPolicies("default", Verdict.PASS, (ALLOW_WEB.id,)),),
        pre_dnat_tiers=(TierPolicies("default", Verdict.PASS, (ALLOW_WEB.id,)),),
    ),
)


@pytest.mark.parametrize("ip_version", [4, 6])
def test_every_chain_is_reached_from_a_hook(ip_version: int) -> None:
    """Contents hold nothing that no packet can meet, and nothing leads to a chain that is not."""
    wanted = replace(with_policy(), host_endpoints=HOSTS)
    for content in contents(wanted, ip_version).values():
        hooks = (*content.inserts.values(), *content.appends.values())
        waiting = list(Chain("", tuple(rule for rules in hooks for rule in rules)).targets)
        reached: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting += content.chains[name].targets
        assert reached == content.chains.keys(), content.name


def bodies(chain: Chain) -> list[str]:
    """Rules without their hashes."""
    return [render.body(rule) for rule in chain.rules]


def test_ipv6_neighbour_discovery_never_depends_on_policy() -> None:
    """Six ICMPv6 types reach the host before the dispatch; IPv4 has nothing of the kind."""
    wanted = desired(default_endpoint_to_host_action="return")
    ipv4 = bodies(contents(wanted)["filter"].chains["cali-wl-to-host"])
    ipv6 = bodies(contents(wanted, 6)["filter"].chains["cali-wl-to-host"])
    assert ipv6[:6] == [
        f"-p 58 -m icmp6 --icmpv6-type {number} --jump ACCEPT"
        for number in (130, 131, 132, 133, 135, 136)
    ]
    assert ipv6[6:] == ipv4


def test_ipv6_tables_are_those_of_ipv4_otherwise() -> None:
    """Only the sets and the ICMPv6 rules differ."""
    wanted = replace(
        desired(), masquerade_pools=frozenset(map(parse_network, ("10.0.0.0/8", "fd00::/48")))
    )
    for table in ("raw", "mangle", "nat", "filter"):
        ipv4, ipv6 = contents(wanted), contents(wanted, 6)
        assert ipv4[table].chains.keys() == ipv6[table].chains.keys()
        for name, chain in ipv4[table].chains.items():
            if name != "cali-wl-to-host":
                expected = [body.replace("cali40", "cali60") for body in bodies(chain)]
                assert bodies(ipv6[table].chains[name]) == expected


def test_endpoint_without_ipv6_address_is_unknown_to_ipv6() -> None:
    """Its interface meets the drop at the end of the dispatch."""
    only_ipv4 = replace(desired(), endpoints=(replace(POD, addresses=ADDRESSES[:1]),))
    chains = contents(only_ipv4, 6)["filter"].chains
    assert not [name for name in chains if name.startswith(("cali-tw-", "cali-fw-", "cali-pr"))]
    assert bodies(chains["cali-from-wl-dispatch"]) == [
        '-m comment --comment "Unknown interface" --jump DROP'
    ]


def test_floating_addresses() -> None:
    """To the pod; and back through the node when a pod calls itself. The lower address wins."""
    first, second = (parse_address(text) for text in ("198.19.16.2", "198.19.16.3"))
    outside, other = parse_address("192.0.2.7"), parse_address("192.0.2.8")
    pods = (
        replace(POD, floating=(FloatingAddress(outside, second), FloatingAddress(other, first))),
        replace(POD, interface="calib", floating=(FloatingAddress(outside, first),)),
    )
    chains = contents(replace(desired(), endpoints=pods))["nat"].chains
    assert bodies(chains["cali-fip-dnat"]) == [
        "--destination 192.0.2.7 --jump DNAT --to-destination 198.19.16.2",
        "--destination 192.0.2.8 --jump DNAT --to-destination 198.19.16.2",
    ]
    assert bodies(chains["cali-fip-snat"]) == [
        "--destination 198.19.16.2 --source 198.19.16.2"
        " --jump SNAT --to-source 192.0.2.7 --random-fully",
    ]
    assert (
        contents(replace(desired(), endpoints=pods), 6)["nat"].chains["cali-fip-dnat"].rules == ()
    )


def test_spoofable_prefixes_skip_the_reverse_path_check() -> None:
    """Each family has its own, on its own interface only."""
    spoofable = tuple(map(parse_network, ("198.19.64.0/24", "fd00:64::/64")))
    wanted = replace(desired(), endpoints=(replace(POD, spoofable=spoofable),))
    for ip_version, prefix in ((4, "198.19.64.0/24"), (6, "fd00:64::/64")):
        chain = contents(wanted, ip_version)["raw"].chains["cali-rpf-skip"]
        assert bodies(chain) == [f"--in-interface cali2b4f0b7d9aa --source {prefix} --jump ACCEPT"]


def test_contents_are_the_same_objects_while_nothing_changes() -> None:
    """Who writes tables sees by identity what one more pod changed."""
    made = TableContents(4)
    before = dict(made.contents(desired()))
    more = replace(
        desired(), endpoints=(POD, replace(POD, interface="cali3000000000a", mac="02::"))
    )
    after = made.contents(more)
    assert [name for name in after if after[name] is not before[name]] == ["filter"]
    changed = {
        name
        for name, chain in after["filter"].chains.items()
        if before["filter"].chains.get(name) is not chain
    }
    assert changed == {
        "cali-from-wl-dispatch",
        "cali-to-wl-dispatch",
        "cali-tw-cali3000000000a",
        "cali-fw-cali3000000000a",
    }
    assert dict(made.contents(more)) == dict(contents(more))


def test_host_endpoint_chains() -> None:
    """Own traffic, forwarded traffic, and an interface without policy of its own."""
    chains = contents(replace(with_policy(), host_endpoints=HOSTS))["filter"].chains
    start = [
        "-m conntrack --ctstate RELATED,ESTABLISHED --jump ACCEPT",
        "-m conntrack --ctstate INVALID --jump DROP",
    ]
    clear = "--jump MARK --set-mark 0/0x30000"
    tier = '-m comment --comment "Start of tier default" --jump MARK --set-mark 0/0x20000'
    accepted = (
        '-m comment --comment "Return if policy accepted"'
        " -m mark --mark 0x10000/0x10000 --jump RETURN"
    )
    end = (
        '-m comment --comment "End of tier default. Drop if no policies passed packet"'
        " -m mark --mark 0/0x20000 --jump DROP"
    )
    no_profile = '-m comment --comment "Drop if no profiles matched" --jump DROP'
    assert bodies(chains["cali-from-host-endpoint"]) == [
        "--in-interface eth0 --goto cali-fh-eth0",
        "--goto cali-fh-any-interface-at-all",
    ]
    assert bodies(chains["cali-to-host-endpoint"]) == [
        "--out-interface eth0 --goto cali-th-eth0",
        '-m comment --comment "Skip egress WHEP policy for traffic to local workload"'
        " --out-interface cali+ --jump RETURN",
        "--goto cali-th-any-interface-at-all",
    ]
    assert bodies(chains["cali-from-hep-forward"])[-1] == "--goto cali-fhfw-_Nqh4HyA73udmyanQI"
    policy = "-m mark --mark 0/0x20000 --jump cali-po-np/prod/allow-web"
    assert bodies(chains["cali-th-eth0"]) == [
        *start, "--jump cali-failsafe-out", clear, tier, policy, accepted, end, no_profile,
    ]  # fmt: skip
    assert bodies(chains["cali-fh-eth0"]) == [*start, "--jump cali-failsafe-in", clear, no_profile]
    inbound = policy.replace("cali-po-", "cali-pi-")
    assert bodies(chains["cali-fhfw-eth0"]) == [*start, clear, tier, inbound, accepted, end]
    assert bodies(chains["cali-thfw-eth0"]) == [
        *start,
        clear,
        '-m comment --comment "Allow forwarded traffic by default"'
        " --jump MARK --set-mark 0x10000/0x10000",
        '-m comment --comment "Return for accepted forward traffic" --jump RETURN',
    ]


def test_untracked_and_early_policy() -> None:
    """Untracked policy stands in raw and switches tracking off; pre-DNAT policy in mangle."""
    found = contents(replace(with_policy(), host_endpoints=HOSTS))
    raw, mangle = found["raw"].chains, found["mangle"].chains
    assert "--jump NOTRACK" in bodies(raw["cali-fh-eth0"])[4]
    assert bodies(raw["cali-fh-eth0"])[-1].endswith("--jump RETURN")
    assert "cali-fh-any-interface-at-all" not in raw
    assert bodies(raw["cali-from-host-endpoint"]) == ["--in-interface eth0 --goto cali-fh-eth0"]
    assert bodies(mangle["cali-fh-eth0"])[-1].endswith("--jump RETURN")
    assert bodies(mangle["cali-th-eth0"])[:3] == [
        "-m conntrack --ctstate RELATED,ESTABLISHED --jump MARK --set-mark 0x10000/0x10000",
        "-m conntrack --ctstate RELATED,ESTABLISHED --jump RETURN",
        "-m conntrack --ctstate INVALID --jump DROP",
    ]
    assert "cali-pi-np/prod/allow-web" in raw
    assert "cali-po-np/prod/allow-web" in mangle


def test_failsafe_ports() -> None:
    """Always open in both directions; in raw the answers, too. A prefix counts in its family."""
    ports = (ProtocolPort("tcp", 22), ProtocolPort("udp", 68, parse_network("10.0.0.0/8")))
    config = FelixConfig(failsafe_inbound=ports, failsafe_outbound=(ProtocolPort("udp", 53),))
    wanted = replace(with_policy(), host_endpoints=HOSTS, config=config)
    first, second, third = (
        "-p tcp -m multiport --destination-ports 22 --jump ACCEPT",
        "-p udp -m multiport --destination-ports 68 --source 10.0.0.0/8 --jump ACCEPT",
        "-p udp -m multiport --source-ports 53 --jump ACCEPT",
    )
    found = contents(wanted)
    assert bodies(found["filter"].chains["cali-failsafe-in"]) == [first, second]
    assert bodies(found["raw"].chains["cali-failsafe-in"]) == [first, second, third]
    assert bodies(contents(wanted, 6)["filter"].chains["cali-failsafe-in"]) == [first]
    assert "cali-failsafe-in" not in contents(with_policy())["filter"].chains


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(
            [{"protocol": "UDP", "port": 68, "net": "10.0.0.0/8"}, {"port": 22}],
            (ProtocolPort("udp", 68, parse_network("10.0.0.0/8")), ProtocolPort("tcp", 22)),
            id="objects",
        ),
        pytest.param(
            "tcp:22,udp:fd00::/8:68,179",
            (
                ProtocolPort("tcp", 22),
                ProtocolPort("udp", 68, parse_network("fd00::/8")),
                ProtocolPort("tcp", 179),
            ),
            id="text",
        ),
        pytest.param([], (), id="an empty list closes them"),
        pytest.param("none", (), id="none closes them"),
        pytest.param("icmp:1", FelixConfig().failsafe_inbound, id="unreadable: the default"),
    ],
)
def test_failsafe_ports_are_read(value: object, expected: tuple[ProtocolPort, ...]) -> None:
    """As objects in FelixConfiguration, as text in the environment."""
    source = from_object("default", {"failsafeInboundHostPorts": value}, {})
    assert settle([source])[0].failsafe_inbound == expected
