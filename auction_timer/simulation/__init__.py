"""The simulator (requirement B10): the production engine and gateway code on virtual time, with seeded work and faults.

timeline, loop    time that passes only when nobody has anything to do; processes that can be frozen
network           what a process reaches the store by: latency, and calls that are lost, late, doubled
archive           the audit archive, which no failover touches
processes         engines, gateways and the reconciler: the real classes, started, killed, frozen
workload          auctions of every policy, storms near their deadlines, repetitions, commands
faults            what goes wrong when
witness           what truly happened, whoever knows of it
checkers          judge the outcome; they share no code with the workload, nor with what they judge beyond the domain
run               all of it from one seed
seeds, report     many seeds on all cores, and what is said of them
"""
