"""The deployment of the app to AWS: the zip of its code, and the Pulumi program that creates its resources.

__main__         the Pulumi program
stack            registers all resources of a stack
components       the components of a stack
grants           the permissions, addresses and ports that a component gives to a function
config           the config of a stack
choices          the nested values of the config
config_keys      refuses keys of the config that would be ignored
environment      the size of the function's environment
protected        refuses updates that would delete protected resources
zones            the availability zones of the subnets
deployed_code    compares the zip with the code that a function runs
artifact         builds the zip
app_files        chooses the files of the app for the zip
ignored_files    tells which files git ignores
wheels           installs the packages for the zip
pythons          finds a Python and compiles modules
deploy           `make deploy`
reference        writes docs/config.md
costs            writes docs/costs.md
"""
