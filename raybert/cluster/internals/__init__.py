"""Everything of Ray's that is private: names with an underscore, `_internal` modules, variables.

No other part of raybert may use a private name of Ray's; a test holds it. Ray promises nothing
about them between versions. A renamed import fails loudly, but a renamed method that we override
gives no error: Ray no longer calls ours. `private_names` lists modules, classes and methods, with
the reason for each, and checks before their use that this Ray has them; the modules beside it name
the variables.
"""
