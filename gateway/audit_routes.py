"""`GET /auctions/{id}/audit`: what happened to an auction, in order, from the stream and the archive together (R34)."""

from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.contract.audit import as_json
from engine.contract.intake import AUCTION_ID
from engine.contract.keys import shard_of
from engine.store.archive import ArchiveUnavailableError
from engine.store.audit_reader import AuditReader
from engine.store.protocol import StoreError
from gateway.auth import Scope, parties, principal_of
from gateway.command_routes import CommandRoutes, away, json_response, unknown_auction
from gateway.problems import unavailable
from gateway.queries import integer_of, limit_of

SEQ_MAX: Final = 10**15 - 1
"""What every reader of JSON holds exactly, in as many digits as a pattern can say."""


@dataclass(frozen=True, slots=True)
class AuditRoutes:
    """The route and what it asks."""

    auctions: CommandRoutes
    reader: AuditReader
    shards: int

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/auctions/{auction_id}/audit", self.records, methods=["GET"])]

    async def records(self, request: Request) -> Response:
        """A page of an auction's records: for its owner, and for operators."""
        limit = limit_of(request.query_params.get("limit"))
        after = integer_of("cursor", request.query_params.get("cursor"), 0, SEQ_MAX) or 0
        auction_id = request.path_params["auction_id"]
        await self._check_access(request, auction_id)
        shard = shard_of(auction_id, self.shards)
        try:
            found = await self.reader.of_auction(shard, auction_id, after, limit + 1)
            is_known = found or (after and await self.reader.of_auction(shard, auction_id, 0, 1))
        except ArchiveUnavailableError:
            raise unavailable("the audit archive cannot be read now") from None
        except StoreError:
            raise away() from None
        if not is_known and await self.auctions.record(auction_id) is None:
            raise unknown_auction(auction_id)
        page = found[:limit]
        return json_response(
            {
                "records": [as_json(fields | {"shard": str(shard)}) for fields in page],
                "next_cursor": page[-1]["seq"] if len(found) > limit else None,
            }
        )

    async def _check_access(self, request: Request, auction_id: str) -> None:
        """Let the owner and operators pass; an auction whose timer is forgotten is the operators' only.

        Raises:
            Problem: `RESOURCE_NOT_FOUND`, the same for an auction that is not there and for somebody else's.
        """
        record = await self.auctions.record(auction_id)
        principal = principal_of(request)
        if AUCTION_ID.fullmatch(auction_id) and principal.may(Scope.OPS):
            return
        if record is None or "owner" not in parties(principal, record.auction.registered.offer):
            raise unknown_auction(auction_id)
