"""How good a policy is: the built-in simulator, closed-loop roll-outs, offline errors, reports."""
