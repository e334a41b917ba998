"""What this node should enforce, worked out from the datastore: pure, without I/O, clock or log.

`state` takes updates and says the whole desired state; `config` settles the parameters; `profiles`
turns stored rules into verdicts; `values` is all that calculation may say.
"""
