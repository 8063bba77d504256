package relay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

const inventory = "inventory.img"

// How long the proxy has to tell why it ended a session. The process is frozen meanwhile.
const toldWithin = 2 * time.Second

// Push sends the images in a directory as snapshot id to the cache at to, as criu dump --stream would, and returns when the
// cache has acknowledged the whole snapshot. Pages that the cache holds for id already are joined by them. Logs and
// statistics stay where they are.
func (d Daemon) Push(ctx context.Context, id, to, dir string) error {
	names, err := images(dir)
	if err != nil {
		return err
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	session, err := asConnection(ours)
	if err != nil {
		theirs.Close()
		return err
	}
	defer session.Close()
	err = d.Open(ctx, id, to, theirs)
	theirs.Close()
	if err != nil {
		return err
	}
	// Whoever waits for the proxy waits no longer.
	unwatch := context.AfterFunc(ctx, func() { _ = session.Close() })
	defer unwatch()
	for _, name := range names {
		if err := sendImage(ctx, session, filepath.Join(dir, name)); err != nil {
			return d.whyEnded(id, fmt.Errorf("%s: %w", name, err))
		}
	}
	// That nothing more comes is the end of the images.
	_ = session.Close()
	if _, err = d.WaitWhole(ctx, id); err != nil {
		return d.givenUp(id, err)
	}
	return nil
}

// images lists what a dump with --stream would have sent of a directory, in an order in which it could have.
func images(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	last := false
	for _, entry := range entries {
		name := entry.Name()
		switch {
		case name == inventory:
			last = true
		case strings.HasSuffix(name, ".img") && !strings.HasPrefix(name, "stats-") && !strings.HasPrefix(name, "irmap-cache"):
			names = append(names, name)
		}
	}
	if !last {
		return nil, fmt.Errorf("%s has no %s: it is no checkpoint", dir, inventory)
	}
	// Only a dump that has succeeded sends it, so it says that the others are all there are.
	return append(names, inventory), nil
}

// sendImage names an image, hands over a pipe, and writes the image into it.
func sendImage(ctx context.Context, session *net.UnixConn, path string) error {
	image, err := os.Open(path)
	if err != nil {
		return err
	}
	defer image.Close()
	if _, err := session.Write(request(filepath.Base(path))); err != nil {
		return err
	}
	out, into, err := os.Pipe()
	if err != nil {
		return err
	}
	defer into.Close()
	err = sendWith(session, []byte{0}, out)
	// With it open here as well, a proxy that gave up would not be noticed.
	out.Close()
	if err != nil {
		return err
	}
	unwatch := context.AfterFunc(ctx, func() { _ = into.SetWriteDeadline(time.Unix(1, 0)) })
	defer unwatch()
	_, err = io.Copy(into, image)
	return err
}

// request encodes an img_streamer_request_entry with its length.
func request(name string) []byte {
	message := protowire.AppendTag(nil, 1, protowire.BytesType)
	message = protowire.AppendString(message, name)
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(message))), message...)
}

// whyEnded finds out why the proxy took no more images: it says so on its control socket.
func (d Daemon) whyEnded(id string, err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), toldWithin)
	defer cancel()
	var damaged *DamagedError
	if _, told := d.WaitWhole(ctx, id); errors.As(told, &damaged) {
		return fmt.Errorf("%w (%w)", damaged, err)
	}
	return d.givenUp(id, err)
}

// givenUp has the proxy abort what may still be under way: nobody waits for it any more.
func (d Daemon) givenUp(id string, err error) error {
	var damaged *DamagedError
	if errors.As(err, &damaged) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), toldWithin)
	defer cancel()
	_ = d.Drop(ctx, id)
	return err
}
