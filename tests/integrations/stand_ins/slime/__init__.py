"""What slime documents of itself, as far as an adapter meets it: `Sample`, the state of its generation, the order in which a
group is generated and scored, and the filter's answer. It is on no package index in a version that has these; with
ROLLOUT_FT_SLIME set to a checkout the tests run against that instead."""
