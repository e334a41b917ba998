"""The CNI executables and the node daemon behind them."""
