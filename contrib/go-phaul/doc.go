// Package relay puts criu-image-proxy and criu-image-cache under phaul, the live migration of go-criu: they take the place
// of the page server processes on the destination and of copied directories of images. No page is written to any disk.
//
//	source host                                                     destination host
//	phaul ── CRIU ──page server protocol──▶ criu-image-proxy ══▶ criu-image-cache ── Restore ── CRIU
//
// On the source host [NewSource] opens the way for the pages of one snapshot at the proxy, and [Source.Migrate] has phaul's
// client make its rounds over it. [Source] is phaul's Remote and its Local, for programs that make the client themselves.
// The last dump's other images join the pages while the process is frozen, and CRIU kills it only once the cache has
// acknowledged all of the snapshot. Whatever fails before lets the process run on.
//
// On the destination host [Restore] has CRIU restore the snapshot from the memory of the cache, through its RPC.
//
// # What a failed notification does
//
// go-criu does not tell CRIU that a notification has failed: it returns, and CRIU waits for an answer with the process
// frozen until the program closes the conversation, which CRIU takes for the failure that it is. [Source] closes it at once.
package relay
