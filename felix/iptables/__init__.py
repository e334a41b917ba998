"""The iptables driver: wanted tables in, the smallest restore transaction out."""
