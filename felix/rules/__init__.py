"""Which iptables rules the node needs: pure values, no iptables here.

`rule` and `match` are the vocabulary; `static`, `dispatch`, `endpoint`, `profile` and `nat` each
write one family of chains; `tables` puts them together into the whole content of every table.
"""
