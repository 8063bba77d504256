// The path is no address to download from: see README.md for using it from a checkout.
module criu-image-relay/go-phaul

go 1.21

require (
	github.com/checkpoint-restore/go-criu/v7 v7.2.0
	google.golang.org/protobuf v1.34.2
)

require golang.org/x/sys v0.25.0 // indirect
