"""Devices: what a stock OVOS with our plugins asks of the node over its socket, `/ws/v2/device`.

`protocol` says what may come when, `socket` carries it, `requests` does what is asked; `house` is what the tenant has
chosen, `talks` what devices have said lately, `reports` what they tell of themselves. `devices` has all that are
connected here. The frames themselves are in `plugins.device.wire`, which both sides share.
"""
