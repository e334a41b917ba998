"""Which iptables rules the node needs: pure values, no iptables here.

`rule` is the vocabulary; `policy_rule` turns one rule of a policy into it; `policy`, `endpoint`,
`host`, `dispatch`, `static`, `spoofing` and `nat` each write one family of chains; `tables` puts
them together into the whole content of every table.
"""
