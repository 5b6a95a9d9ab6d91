"""Which tensor of a checkpoint becomes which tensor of a resident model: pure, on structures alone.

plan         what a push would send, and every reason why it could not
views        which reading of the names fits, of those that are tried by themselves
names        wrappers' components and prefixes, taken off names
adapters     the names under which peft saves adapters
renames      names that the user maps: rules and mapping files
casting      which dtypes become which others
differences  what does not fit, in words; also what a daemon refuses
"""
