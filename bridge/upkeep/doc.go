// Package upkeep does, for the bridge that has a source, what time does by itself: it adds new messages to the feeds of
// consumers that have one, notifies those who listen, writes the events of pipelines, ends leases that have run out,
// removes what newer rows have replaced, opens and drops segments of the log. Each is a short transaction of one bridge_*
// function, which holds the rule; here is only the clock. Nothing is lost while none of this runs: receive does for itself
// what it cannot wait for, and the log is kept for pipelines.
package upkeep
